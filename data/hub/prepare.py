"""FineWeb-Edu, OpenWebText or any other column of text on the Hugging Face Hub, or in parquet files that are here.

    python data/hub/prepare.py [--max_tokens=1_000_000_000] [--data_dir=FOLDER]
    python data/hub/prepare.py --repo=Skylion007/openwebtext --subset=plain_text --data_dir=FOLDER
    python data/hub/prepare.py --input=FILE_OR_FOLDER --data_dir=FOLDER

Needs pyarrow. Takes one parquet file after the other, in the order of the Hub's list of them; of large data sets that
list may hold a first part only (its split is then called partial-train). Documents stay whole and in order; nulls are
left out. What is done so far is in DATA_DIR/hub.part: the same command goes on there after any interruption, and the
data set that it makes is the same to the byte.
"""
import hashlib
import http.client
import json
import os
import shutil
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import tiktoken
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanogqa.configurator import UserError, build, parse, program
from nanogqa.files import write_json
from nanogqa.tokenizer import copy_tokenizer
from nanogqa.writer import PrepareConfig, ShardWriter, find_finished, find_unfinished, open_tokenizer, print_counts, publish

RETRIES, BACKOFF = 6, 1.0  # tries in a row that bring no new byte, and the seconds before the first, which then double
SAVE_SECONDS = 10  # of work that a kill may cost
BATCH, PART = 1024, 16  # documents that are read at once, and that a core takes of them
NETWORK = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)


@dataclass
class HubConfig(PrepareConfig):
    tokenizer: str = "gpt2"       # byte, the name of any tiktoken encoding, or a folder with a tokenizer.json
    input: str | None = None      # a parquet file, or a folder of them, to read instead of the Hub's
    overwrite: bool = False       # replace another data set, or an unfinished one of other settings
    repo: str = "HuggingFaceFW/fineweb-edu"  # the Hub's name of the data set
    subset: str = "sample-10BT"   # the Hub's name of its part (default where there is but one)
    split: str = "train"          # the Hub's split, which is split again into train and val
    column: str = "text"          # the column that holds the documents
    max_tokens: int | None = None  # stop after the document that reaches so many tokens, train and val together; None: take all
    val_fraction: float = 0.001   # share of the documents that validates, by a hash of their text: equal texts stay together
    tokens_per_file: int = 10**8  # a file of the train split ends with the document that reaches so many
    workers: int | None = None    # threads that tokenize; None: one a core (for a tokenizer.json, RAYON_NUM_THREADS says it)
    endpoint: str | None = None   # address of the Hub; None: the environment's HF_ENDPOINT, or https://huggingface.co

    def __post_init__(self):
        for key in ("max_tokens", "tokens_per_file", "workers"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")


class Corrupt(Exception):
    """A parquet file that cannot be read."""


# -- parquet files -----------------------------------------------------------------------------------------------------

def download(url, path):
    """Fetches url into path, from where an earlier try left off. UserError where the server refuses or stays away."""
    part, best, failures = path.with_name(path.name + ".part"), 0, 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as response:
                have = have if response.status == 206 else 0  # 200: this server sends everything, ranges or not
                length = response.headers["Content-Length"]
                total = have + int(length) if length else None
                with open(part, "ab" if have else "wb") as file, tqdm(
                        total=total, initial=have, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                    while chunk := response.read(2**20):
                        bar.update(file.write(chunk))
            problem = "the connection dropped"
            if total in (None, part.stat().st_size):
                os.replace(part, path)
                return
        except NETWORK as error:
            problem, code = str(error), getattr(error, "code", 500)
            if code == 416:  # these bytes are of another file, or all that there are
                part.unlink()
            elif code < 500 and code not in (408, 429):
                raise UserError(f"{url} answers {code} ({error.reason}): check --repo, --subset and --split, or pass parquet "
                                "files as --input=FOLDER") from None
        size = part.stat().st_size if part.exists() else 0
        best, failures = max(best, size), 0 if size > best else failures + 1
        if failures == RETRIES:
            raise UserError(f"cannot fetch {url} ({problem}, {RETRIES} times in a row): run the same command later, it goes on "
                            "from here")
        time.sleep(BACKOFF * 2**failures / 2)


def find_sources(config):
    """The parquet files in order: addresses on the Hub, or paths below --input."""
    if config.input is not None:
        path = Path(config.input)
        paths = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if not paths:
            raise UserError(f"there are no parquet files at {path}: name one, or a folder of them, with --input=PATH")
        return [str(path.resolve()) for path in paths]
    base = (config.endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = "/".join([base, "api/datasets", quote(config.repo), "parquet", quote(config.subset, ""), quote(config.split, "")])
    if not base.startswith(("http://", "https://")):
        raise UserError(f"{base!r} is no address of a Hub: give --endpoint or HF_ENDPOINT like https://huggingface.co")
    with tempfile.TemporaryDirectory() as folder:
        download(url, Path(folder) / "list")
        try:
            urls = json.loads((Path(folder) / "list").read_bytes())
            if urls and all(url.startswith(("http://", "https://")) for url in urls):
                return urls
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
    raise UserError(f"{url} answers with no list of parquet files: check --repo, --subset, --split and --endpoint")


def read_batches(path, column, start):
    """(rows read so far, their texts) of a parquet file, from row start on."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            known = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.large_string())]
            if column not in known:
                raise UserError(f"{path.name} has no column of text {column!r}: choose --column from {', '.join(known)[:200]}")
            row = 0
            for group in range(file.num_row_groups):  # one at a time: iter_batches() alone may hold on to all
                if row + (n := file.metadata.row_group(group).num_rows) <= start:
                    row += n
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column]):
                    texts = batch.column(0)[max(0, start - row):].to_pylist()
                    row += len(batch)
                    if row > start:
                        yield row, [text for text in texts if text is not None]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Corrupt(" ".join(str(error).split())[:200]) from None


def tokenize(batches, encoding, pool):
    """(rows, texts, ids of each) of batches; the pool works on the next batch while one is written."""
    def encode(texts):  # in threads: tiktoken works without the GIL, and into arrays, as lists would need it
        if isinstance(encoding, tiktoken.Encoding):
            return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return encoding.encode_ordinary_batch(texts)
    size = PART if isinstance(encoding, tiktoken.Encoding) else BATCH  # a tokenizer.json's batches spread by themselves
    before = None
    for rows, texts in batches:
        ids = pool.map(encode, [texts[i:i + size] for i in range(0, len(texts), size)])
        if before:
            yield before
        before = rows, texts, chain.from_iterable(ids)
    if before:
        yield before


# -- the data set ------------------------------------------------------------------------------------------------------

def write_splits(config, folder, state, encoding, dtype):
    """Tokenizes the files of state["sources"] into folder, from where state stands."""
    out = ShardWriter(folder, state, encoding.eot_token, dtype, config.tokens_per_file)
    done, limit = sum(file["tokens"] for file in chain(*state["splits"].values())), config.max_tokens or 2**62
    workers = (config.workers or os.cpu_count()) if isinstance(encoding, tiktoken.Encoding) else 1
    local, corrupt = config.input is not None, None  # corrupt: the file that was downloaded twice
    with ThreadPoolExecutor(workers) as pool, tqdm(total=config.max_tokens, initial=done, desc="tokenizing", unit=" tokens",
                                                   unit_scale=True, disable=None) as bar:
        while state["file"] < len(state["sources"]) and done < limit:
            source = state["sources"][state["file"]]
            path = Path(source) if local else folder / f"{state['file']:05d}.parquet"
            bar.set_postfix_str(f"file {state['file'] + 1} of {len(state['sources'])}")
            if not local and not path.exists():
                download(source, path)
            try:
                for rows, texts, ids in tokenize(read_batches(path, config.column, state["rows"]), encoding, pool):
                    for text, document in zip(texts, ids):
                        if done < limit:
                            raw = text.encode()
                            share = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64
                            out.add("val" if share < config.val_fraction else "train", document, len(raw))
                            done += len(document) + 1
                            bar.update(len(document) + 1)
                    state["rows"] = rows
                    if done >= limit:
                        break
                    if time.monotonic() - out.saved >= SAVE_SECONDS:
                        out.save()
            except Corrupt as error:
                if not local:
                    path.unlink()
                if local or corrupt == source:
                    raise UserError(f"{source} is no sound parquet file ({error}): get it again, or go without it") from None
                corrupt = source
                continue
            out.save(file=state["file"] + 1, rows=0)
            if not local:
                path.unlink()
    out.finish()


@program
def main(argv):
    config = build(HubConfig, parse(HubConfig, argv, __doc__))
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("parquet files are read with pyarrow, which is not installed: pip install pyarrow") from None
    data_dir = Path(config.data_dir or Path(__file__).parent)
    name, encoding, dtype = open_tokenizer(config.tokenizer, data_dir, config.overwrite)
    source = dict(repo=config.repo, subset=config.subset, split=config.split)
    if config.input is not None:
        source = dict(input=Path(config.input).resolve().name)
    source |= dict(column=config.column, max_tokens=config.max_tokens, val_fraction=config.val_fraction,
                   tokens_per_file=config.tokens_per_file)
    about = dict(source=source, tokenizer=name, vocab_size=encoding.n_vocab, dtype=dtype.name)
    if meta := find_finished(data_dir, about, config.overwrite):
        return print_counts(data_dir, meta)
    folder = data_dir / "hub.part"
    try:
        state = find_unfinished(folder, about, config.overwrite)
        if not state:
            state = dict(about=about, sources=find_sources(config), file=0, rows=0, splits=dict(train=[], val=[]))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / "progress.json", state)
        if "finished" not in state:
            write_splits(config, folder, state, encoding, dtype)
        for split, files in state["splits"].items():
            if not sum(file["bytes"] for file in files):
                raise UserError(f"no text for the {split} split: take more, or another --val_fraction, with --overwrite=True")
        copy_tokenizer(name, config.tokenizer, data_dir)
        meta = publish(folder, data_dir, about, state["splits"])
    except OSError as error:
        raise UserError(f"cannot write the data set to {data_dir} ({error.strerror}): pass another --data_dir") from None
    print_counts(data_dir, meta)


if __name__ == "__main__":
    main()
