"""Associative recall: records, then questions about them. The loss counts the answers alone.

    python data/recall/prepare.py [--fields=3] [--records=8] [--train=100000] [--data_dir=FOLDER]

A record has one value in each field, and a separator ends it. A question names two fields and the
value of the first in some record; the answer is the value of the second in the same record. With
fields=1 a record is a key and a value, and questions ask for the value (MQAR, arXiv 2312.04927).
"""
import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # data/ may be a link
from nanogqa.configurator import build, in_range, parse, program
from nanogqa.writer import DataTokenizer, NoText, write_encoded

END, SEPARATOR, ASK = range(3)  # ids; then one for each relation, and VALUES for each field
VALUES = 64
QUESTION = 4  # tokens: ASK, relation, value, answer, which is predicted at the value


@dataclass
class RecallConfig:
    fields: int = 3               # fields of a record; 1: a key and a value
    records: int = 8              # records of a sequence; in training also a half, a quarter, ...
    gap: int = 0                  # end-of-text tokens between the records and the questions
    length: int = 128             # tokens of a sequence, filled up with questions and end-of-text
    train: int = 100_000          # training sequences
    val: int = 1000               # validation sequences
    seed: int = 1337              # the same seed gives the same data
    data_dir: str | None = None   # folder for the data set; None: the folder of the script
    overwrite: bool = False       # replace the data set in data_dir with another one

    def __post_init__(self):
        in_range(self, "fields", low=1)
        in_range(self, "train val", low=2)  # windows take the token after their last one
        in_range(self, "records", low=1, high=VALUES)
        in_range(self, "seed gap", low=0)
        self.width = max(2, self.fields)
        needed = self.records * (self.width + 1) + self.gap + QUESTION + 1
        if self.length < needed:
            raise ValueError(f"length={self.length} has no room for {self.records} records, the "
                             f"gap and a question: it must be at least {needed}")
        self.relations = list(itertools.permutations(range(self.width), 2))
        if self.fields == 1:
            self.relations = [(0, 1)]
        self.first_value = ASK + 1 + len(self.relations)


def sequence(config, n_records, rng):
    """The ids of a sequence. No value is in two records, and no question is asked twice."""
    columns = []
    for field in range(config.width):
        start = config.first_value + field * VALUES
        columns.append(rng.sample(range(start, start + VALUES), n_records))
    ids = []
    for record in zip(*columns, strict=True):
        ids += [*record, SEPARATOR]
    ids += [END] * config.gap
    questions = list(itertools.product(range(n_records), range(len(config.relations))))
    room = (config.length - 1 - len(ids)) // QUESTION
    for record, relation in rng.sample(questions, min(room, len(questions))):
        asked, wanted = config.relations[relation]
        ids += [ASK, ASK + 1 + relation, columns[asked][record], columns[wanted][record]]
    return ids + [END] * (config.length - 1 - len(ids))  # the writer adds the last one


def sequences(config):
    """Yields (split, ids, bytes). Models learn to recall from few records first, so training
    sequences have config.records, a half, a quarter and so on down to 2 or 3 in turn."""
    easier = [config.records]
    while easier[-1] >= 4:
        easier.append(easier[-1] // 2)
    for split, count, sizes in (("train", config.train, easier), ("val", config.val, easier[:1])):
        rng = random.Random(f"{config.seed} {split}")
        for i in range(count):
            yield split, sequence(config, sizes[i % len(sizes)], rng), config.length


@program
def main(argv):
    config = build(RecallConfig, parse(RecallConfig, argv, __doc__))
    tokenizer = DataTokenizer("none", "", NoText(config.first_value + VALUES * config.width, END))
    about = dict(source="associative recall", fields=config.fields, records=config.records,
                 seed=config.seed, answer_after=ASK, answer_distance=QUESTION - 1,
                 sequence_length=config.length)
    if config.gap:
        about["gap"] = config.gap
    data_dir = config.data_dir or Path(__file__).parent
    write_encoded(sequences(config), data_dir, tokenizer, about, config.overwrite)


if __name__ == "__main__":
    main()
