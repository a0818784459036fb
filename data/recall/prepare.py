"""Associative recall: records, then questions about them. The loss counts the answers alone.

    python data/recall/prepare.py [--fields=3] [--records=8] [--train=100000] [--data_dir=FOLDER]

A record has one value in each field, and a separator ends it. A question names two fields and the
value of the first in some record; the answer is the value of the second in the same record. With
fields=1 a record is a key and a value, and questions ask for the value (MQAR, arXiv 2312.04927).
"""
import itertools
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanogqa.configurator import build, in_range, parse, program
from nanogqa.writer import DataTokenizer, NoText, write_encoded

END, SEPARATOR, ANSWER = range(3)  # ids; then an id for each relation, and VALUES for each field
VALUES = 64
QUESTION = 4  # tokens: relation, value, ANSWER, the answer


@dataclass
class RecallConfig:
    fields: int = 3               # fields of a record; 1: a key and a value
    records: int = 8              # records of a sequence; in training also a half, a quarter, ...
    length: int = 128             # tokens of a sequence, filled up with questions and end-of-text
    train: int = 100_000          # training sequences
    val: int = 1000               # validation sequences
    seed: int = 1337              # the same seed gives the same data
    data_dir: str | None = None   # folder for the data set; None: the folder of the script
    overwrite: bool = False       # replace the data set in data_dir with another one

    def __post_init__(self):
        in_range(self, "fields length", low=1)
        in_range(self, "train val", low=2)  # windows take the token after their last one
        in_range(self, "records", low=1, high=VALUES)
        in_range(self, "seed", low=0)
        needed = self.records * (len(fields_of(self)) + 1) + QUESTION + 1
        if self.length < needed:
            raise ValueError(f"length={self.length} has no room for {self.records} records and a "
                             f"question: it must be at least {needed}")


def fields_of(config):
    return range(max(2, config.fields))


def relations_of(config):
    """The (field of the question, field of the answer) pairs that are asked for."""
    if config.fields == 1:
        return [(0, 1)]
    return list(itertools.permutations(fields_of(config), 2))


def sequence(n_records, config, rng):
    """The ids of one sequence: no value is in two records, no question is asked twice."""
    relations = relations_of(config)
    first = ANSWER + 1 + len(relations)  # id of the first value
    columns = []
    for field in fields_of(config):
        start = first + field * VALUES
        columns.append(rng.sample(range(start, start + VALUES), n_records))
    ids = []
    for record in zip(*columns, strict=True):
        ids += [*record, SEPARATOR]
    questions = list(itertools.product(range(n_records), range(len(relations))))
    room = (config.length - 1 - len(ids)) // QUESTION
    for record, relation in rng.sample(questions, min(room, len(questions))):
        asked, wanted = relations[relation]
        ids += [ANSWER + 1 + relation, columns[asked][record], ANSWER, columns[wanted][record]]
    return ids + [END] * (config.length - 1 - len(ids))  # the writer adds one more


def sequences(config):
    """Yields (split, ids, bytes) for each sequence. Models learn many records after few ones, so
    training sequences have all of config.records, a half, a quarter and so on in turn."""
    counts = [config.records]
    while counts[-1] > 2:
        counts.append(counts[-1] // 2)
    for split, n_records in (("val", [config.records]), ("train", counts)):
        rng = random.Random(f"{config.seed} {split}")
        for i in range(getattr(config, split)):
            yield split, sequence(n_records[i % len(n_records)], config, rng), config.length


@program
def main(argv):
    config = build(RecallConfig, parse(RecallConfig, argv, __doc__))
    vocab_size = ANSWER + 1 + len(relations_of(config)) + VALUES * len(fields_of(config))
    about = dict(source="associative recall", answer_after=ANSWER, sequence_length=config.length)
    settings = asdict(config)
    for key in ("fields", "records", "train", "val", "seed"):
        about[key] = settings[key]
    data_dir = config.data_dir or Path(__file__).parent
    tokenizer = DataTokenizer("none", "", NoText(vocab_size, END))
    write_encoded(sequences(config), data_dir, tokenizer, about, config.overwrite)


if __name__ == "__main__":
    main()
