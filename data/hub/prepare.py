"""FineWeb-Edu, OpenWebText or other text on the Hugging Face Hub, or in local parquet files.

    python data/hub/prepare.py [--max_tokens=1_000_000_000] [--data_dir=FOLDER]
    python data/hub/prepare.py --repo=Skylion007/openwebtext --subset=plain_text --data_dir=FOLDER
    python data/hub/prepare.py --input=FILE_OR_FOLDER --data_dir=FOLDER

Needs pyarrow and huggingface_hub. Reads the parquet files that the Hub makes of every data set, one
after the other, sorted by name; of large data sets they may hold the first part only. Documents
stay whole and in order; nulls are skipped. Progress is kept in DATA_DIR/hub.part: after an
interruption run the same command again, and the result is identical to the byte.
"""
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from urllib.parse import urlsplit

import tiktoken
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # data/ may be a link
from nanogqa import schema
from nanogqa.configurator import UserError, build, in_range, one_line, parse, program
from nanogqa.dataloader import Dataset
from nanogqa.files import created, lock
from nanogqa.tokenizer import encode_text
from nanogqa.writer import (
    DatasetWriter,
    PrepareConfig,
    cannot_write,
    find_finished,
    find_unfinished,
    input_files,
    open_tokenizer,
    print_counts,
)

BRANCH = "refs/convert/parquet"  # where the Hub keeps the parquet files that it makes of a data set
RETRIES = 6         # tries before a busy or unreachable Hub ends the run
BACKOFF = 1.0       # seconds before the second try; doubles with each
TIMEOUT = 10        # seconds of silence that end a try
PATIENCE = 60       # seconds in which SLOWEST bytes must arrive
SLOWEST = 2**16
LARGEST = 2**25     # bytes of an answer that is not a parquet file
MOST_PAGES = 1000   # answers to one question
SAVE_SECONDS = 10   # work that a kill may cost
BATCH = 1024        # documents that are read at once
PART = 16           # documents of a batch that one thread tokenizes at a time

# Plain HTTP: hf_xet reports network errors as other exceptions than huggingface_hub documents.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")


@dataclass
class HubConfig(PrepareConfig):
    tokenizer: str = "gpt2"       # byte, a tiktoken encoding, or a folder with a tokenizer.json
    input: str | None = None      # parquet file, or folder of them, to read instead of the Hub's
    overwrite: bool = False       # replace another data set, or one of input files of equal names
    repo: str = "HuggingFaceFW/fineweb-edu"  # name of the data set on the Hub
    subset: str = "sample-10BT"   # its subset ("default" if it has only one)
    split: str = "train"          # its split, which is divided again into train and val
    revision: str | None = None   # commit of its parquet files, as in meta.json; None: the newest
    column: str = "text"          # column with the documents
    max_tokens: int | None = None  # stop after the document that reaches this in train plus val
    val_fraction: float = 0.001   # share of documents for val, by hash: equal texts stay together
    tokens_per_file: int = 10**8  # a train file ends with the document that reaches this
    workers: int | None = None    # threads; None: one per core (tokenizer.json: RAYON_NUM_THREADS)
    endpoint: str | None = None   # address of the Hub; None: HF_ENDPOINT, or https://huggingface.co

    def __post_init__(self):
        in_range(self, "max_tokens tokens_per_file workers", low=1)
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        for key in ("subset", "split"):
            value = getattr(self, key)
            if not schema.base_name(value):
                raise ValueError(f"{key} must be a name without slashes, not {value!r}")
        if self.revision is not None and not commit_hash(self.revision):
            raise ValueError(f"revision must be a commit of 40 hex digits, not {self.revision!r}")


@dataclass
class Position:
    """The parquet files, and how many of them and of the next one's rows are done."""
    folder: str    # of the repository, or --input
    names: list    # of the files below folder, in order
    file: int = 0
    rows: int = 0


POSITION = {"folder": str, "names": [str], "file": schema.count, "rows": schema.count}


class Corrupt(Exception):
    """A parquet file cannot be read."""


class Unreachable(UserError):
    """The Hub cannot be reached, or is busy: the same command may continue later."""


def commit_hash(name):
    """The name of a commit in hexadecimal."""
    return isinstance(name, str) and re.fullmatch("[0-9a-f]{40}", name) is not None


# -- the Hub ---------------------------------------------------------------------------------------

class Hub:
    """The data set that config names on the Hub, or on a server that speaks the same protocol."""

    def __init__(self, config):
        given = (config.endpoint, os.environ.get("HF_ENDPOINT"))
        for address in given:
            if address and not is_address(address):  # the library reads it when it is imported
                raise UserError(
                    f"{address!r:.100} is not the address of a Hub: give --endpoint or "
                    "HF_ENDPOINT like https://huggingface.co"
                )
        try:
            from huggingface_hub import HfApi, errors, set_client_factory
        except ImportError:
            raise UserError(
                "this huggingface_hub is too old: pip install -U huggingface_hub (transformers 4 "
                "needs an old one, so use another environment than its own)"
            ) from None
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()  # no warning for each retry
        set_client_factory(self.new_client)
        self.errors = errors
        self.downloading = False  # a parquet file, which may be large
        self.n_answers = 0        # to the question that is being asked
        self.config = config
        self.endpoint = (given[0] or given[1] or "https://huggingface.co").rstrip("/")
        self.api = HfApi(endpoint=self.endpoint)  # reads HF_TOKEN

    def new_client(self):
        """A client whose answers are bounded in size and time. huggingface_hub sends with it."""
        from huggingface_hub.utils._http import default_client_factory
        client = default_client_factory()
        client.event_hooks["request"].append(self.limit_silence)
        client.event_hooks["response"].append(self.limit_answer)
        return client

    def limit_silence(self, request):
        for key, seconds in request.extensions["timeout"].items():
            request.extensions["timeout"][key] = seconds or TIMEOUT

    def limit_answer(self, response):
        """Makes reading the response end with an error if it is too large or too slow."""
        self.n_answers += 1
        if self.n_answers > MOST_PAGES and not self.downloading:
            raise UserError(f"{self.endpoint} sends more than {MOST_PAGES:,} answers: check --repo "
                            "and --endpoint")
        for name in ("Retry-After", "RateLimit"):
            if re.search(r"\d{4}", response.headers.get(name, "")):  # seconds
                del response.headers[name]  # the library would wait as long
        largest = LARGEST
        if self.downloading and response.is_success and "Content-Length" in response.headers:
            largest = float("inf")  # HTTP ends it at that length
        read = response.iter_bytes

        def iter_bytes(chunk_size=None):
            start = time.monotonic()
            total = 0
            recent = 0  # since start
            for chunk in read():
                total += len(chunk)
                recent += len(chunk)
                if total > largest:
                    raise UserError(
                        f"{self.endpoint} sends more than {LARGEST:,} bytes where a short answer "
                        "is expected: check --repo and --endpoint"
                    )
                if time.monotonic() - start > PATIENCE:
                    if recent < SLOWEST:
                        raise OSError(f"only {recent:,} bytes in {PATIENCE} s")
                    start = time.monotonic()
                    recent = 0
                yield chunk

        response.iter_bytes = iter_bytes

    def find_files(self):
        """(commit, Position) of the parquet files. Raises UserError if there are none."""
        config = self.config
        commit = config.revision
        if commit is None:
            commit = self.ask(self.api.dataset_info, config.repo, revision=BRANCH).sha
        if not commit_hash(commit):
            raise self.not_a_hub(f"{commit!r} is not a commit")
        for folder in folders_of(config):
            names = self.ask(self.list_names, folder, commit)
            if names:
                return commit, Position(folder, names)
        raise UserError(
            f"data set {config.repo!r} has no parquet files for {config.subset}/{config.split}: "
            "check --repo, --subset and --split"
        )

    def list_names(self, folder, commit):
        """The names of the parquet files in a folder of the repository; [] if it does not exist."""
        names = []
        try:
            for entry in self.api.list_repo_tree(
                self.config.repo, folder, revision=commit, repo_type="dataset"
            ):
                name = os.path.basename(entry.path)
                is_file = schema.base_name(name) and name.endswith(".parquet")
                if is_file and entry.path == f"{folder}/{name}":
                    names.append(name)
        except self.errors.EntryNotFoundError:
            return []
        return sorted(set(names))

    def download(self, name, commit, path):
        """Downloads a file of the repository to path, by way of a folder beside it."""
        folder = path.parent / "download"
        self.downloading = True
        downloaded = self.ask(
            self.api.hf_hub_download, self.config.repo, name,
            revision=commit, repo_type="dataset", local_dir=folder,
        )
        self.downloading = False
        os.replace(downloaded, path)
        shutil.rmtree(folder)

    def ask(self, call, *args, **kwargs):
        """Returns call(*args, **kwargs), retrying while the Hub is busy or cannot be reached.

        Raises UserError if it refuses, or after RETRIES tries.
        """
        errors = self.errors
        self.n_answers = 0
        for failures in range(RETRIES):
            if failures:
                time.sleep(BACKOFF * 2 ** (failures - 1))
            try:
                return call(*args, **kwargs)
            except UserError:
                raise
            except errors.HFValidationError:
                raise UserError(
                    f"{self.config.repo!r} cannot be a data set: write --repo=OWNER/NAME"
                ) from None
            except (errors.HTTPError, OSError) as error:
                if isinstance(error, errors.LocalEntryNotFoundError):
                    error = error.__cause__ or error  # why the file could not be located
                if isinstance(error, OSError) and error.errno is not None:
                    raise error  # from this machine's disk, not from the network
                self.raise_if_refused(error)
                problem = one_line(error)
            except Exception as error:  # which ones a bad answer leads to is not documented
                raise self.not_a_hub(error) from None
        raise Unreachable(
            f"cannot get {self.config.repo!r} from {self.endpoint} ({problem}, {RETRIES} times in "
            "a row): run the same command later, it continues from here"
        )

    def not_a_hub(self, problem):
        """The UserError for an answer that the Hub would not give."""
        return UserError(
            f"{self.endpoint} answers {self.config.repo!r} differently from the Hub "
            f"({one_line(problem, 100)}): check --repo and --endpoint"
        )

    def raise_if_refused(self, error):
        """Raises UserError if another try cannot help."""
        errors = self.errors
        repo = self.config.repo
        refusals = {  # subclasses first: a GatedRepoError is also a RepositoryNotFoundError
            errors.OfflineModeIsEnabled:
                "HF_HUB_OFFLINE forbids downloads: unset it, or pass --input=FOLDER",
            errors.GatedRepoError:
                f"data set {repo!r} is gated: accept its terms at {self.endpoint}/datasets/{repo}, "
                "and set HF_TOKEN to a token of your account",
            errors.RepositoryNotFoundError:
                f"there is no data set {repo!r} at {self.endpoint}, or it is private: check "
                "--repo, or set HF_TOKEN",
            errors.RevisionNotFoundError:
                f"data set {repo!r} has no parquet files at {self.config.revision or BRANCH}: "
                "check --revision, or pass parquet files as --input=FOLDER",
        }
        for kind, sentence in refusals.items():
            if isinstance(error, kind):
                raise UserError(sentence)
        response = getattr(error, "response", None)  # of an HfHubHTTPError
        if response is None or response.status_code >= 500 or response.status_code in (408, 429):
            return
        url = str(response.url).partition("?")[0]
        if url.startswith(self.endpoint):  # not a storage server, whose signed addresses expire
            raise UserError(
                f"{url} answers {response.status_code}: check --repo, --subset, --split and "
                "HF_TOKEN, or pass parquet files as --input=FOLDER"
            )


def is_address(text):
    """Whether text is the http or https address of a server."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # includes UnicodeError
        return False
    return valid and bool(parts.hostname) and text.isprintable() and " " not in text


# -- parquet files ---------------------------------------------------------------------------------

def find_local_files(config, data_dir):
    """The Position at the start of the parquet files at --input, sorted by path."""
    path = Path(config.input)
    if path.is_file():
        return Position(str(path.parent), [path.name])
    names = list(input_files(path, "*.parquet", data_dir))
    if not names:
        raise UserError(
            f"there are no parquet files at {path}: name one, or a folder of them, with "
            "--input=PATH"
        )
    return Position(str(path), names)


def read_batches(path, column, start):
    """Yields (rows read so far, their texts) of a parquet file, from row start on."""
    import pyarrow
    import pyarrow.parquet
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            check_column(file.schema_arrow, path, column)
            if start > file.metadata.num_rows:
                raise UserError(
                    f"{path.name} has {file.metadata.num_rows} rows, but hub.part/progress.json "
                    f"says that {start} are done: remove hub.part to begin again"
                )
            for group in range(file.num_row_groups):  # one call for all may hold all in memory
                n_rows = file.metadata.row_group(group).num_rows
                if row + n_rows <= start:
                    row += n_rows
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column]):
                    texts = batch.column(0)[max(0, start - row):].to_pylist()
                    row += len(batch)
                    if row > start:
                        yield row, [text for text in texts if text is not None]
    except MemoryError:
        raise  # pyarrow's own is an ArrowException too
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Corrupt(one_line(error)) from None


def check_column(schema, path, column):
    import pyarrow
    known = []
    for field in schema:
        if field.type in (pyarrow.string(), pyarrow.large_string()):
            known.append(field.name)
    if not known:
        raise UserError(f"{path.name} has no column of text: choose another --repo or --input")
    if column not in known:
        raise UserError(
            f"{path.name} has no column of text {column!r}: choose --column from "
            f"{', '.join(known)[:200]}"
        )


def tokenize(batches, encoding, pool):
    """Yields (rows, texts, ids of each text). The pool works one batch ahead of the caller."""
    size = BATCH  # a tokenizer.json uses all cores for a batch
    if isinstance(encoding, tiktoken.Encoding):
        size = PART
    before = None
    for rows, texts in batches:
        parts = [texts[i:i + size] for i in range(0, len(texts), size)]
        ids = chain.from_iterable(pool.map(encode, parts, repeat(encoding)))
        if before is not None:
            yield before
        before = (rows, texts, ids)
    if before is not None:
        yield before


def encode(texts, encoding):
    """Ids of each text, without special tokens."""
    if isinstance(encoding, tiktoken.Encoding):
        # arrays, not lists: they are made without the GIL, so that threads run in parallel
        to_numpy = functools.partial(encoding.encode_to_numpy, disallowed_special=())
        return [encode_text(to_numpy, text) for text in texts]
    try:
        return encoding.encode_ordinary_batch(texts)
    except BaseException:  # tokenizers may panic: one by one, which names the text in the message
        return [encode_text(encoding.encode_ordinary, text) for text in texts]


# -- the data set ----------------------------------------------------------------------------------

def add_document(config, writer, text, ids):
    """Appends a document to train or val, chosen by the hash of its text."""
    raw = text.encode()
    share = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64  # uniform in [0, 1)
    split = "train"
    if share < config.val_fraction:
        split = "val"
    writer.add(split, ids, len(raw))


def is_full(config, writer):
    return config.max_tokens is not None and writer.n_tokens >= config.max_tokens


def write_file(config, writer, position, path, pool, bar):
    """Tokenizes a parquet file from position on, up to its end or max_tokens. May raise Corrupt."""
    saved = time.monotonic()
    batches = read_batches(path, config.column, position.rows)
    for rows, texts, all_ids in tokenize(batches, writer.tokenizer.encoding, pool):
        for text, ids in zip(texts, all_ids, strict=True):
            if is_full(config, writer):
                return
            add_document(config, writer, text, ids)
            bar.update(len(ids) + 1)
        position.rows = rows
        if time.monotonic() - saved >= SAVE_SECONDS:
            writer.save(asdict(position))
            saved = time.monotonic()


def write_files(config, hub, writer, position):
    """Tokenizes the parquet files from position on. hub is None if they are local."""
    workers = config.workers or os.cpu_count()
    if not isinstance(writer.tokenizer.encoding, tiktoken.Encoding):
        workers = 1
    corrupt = None  # the file that is downloaded for the second time
    bar = tqdm(
        total=config.max_tokens, initial=writer.n_tokens, desc="tokenizing", unit=" tokens",
        unit_scale=True, disable=None,
    )
    with ThreadPoolExecutor(workers) as pool, bar:
        while position.file < len(position.names) and not is_full(config, writer):
            bar.set_postfix_str(f"file {position.file + 1} of {len(position.names)}")
            name = position.names[position.file]
            path = Path(position.folder) / name
            if hub is not None:
                path = writer.part / f"{position.file:05d}.parquet"
                if not path.exists():
                    hub.download(f"{position.folder}/{name}", writer.about["commit"], path)
            try:
                write_file(config, writer, position, path, pool, bar)
            except Corrupt as error:
                if hub is None or corrupt == name:
                    raise UserError(
                        f"{Path(position.folder) / name} is not a sound parquet file ({error}): "
                        "get it again, or pass the other files as --input=FOLDER"
                    ) from None
                corrupt = name
                path.unlink()
                continue
            position.file += 1
            position.rows = 0
            writer.save(asdict(position))
            if hub is not None:
                path.unlink()


def read_position(config, progress, part):
    """The Position in progress, which was read from disk. Raises UserError if it is not valid."""
    try:
        schema.check(progress["position"], POSITION)
        position = Position(**progress["position"])  # TypeError: further keys
        if config.input is None:
            schema.check(progress["about"], {"commit": commit_hash})
        check_position(config, position)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{part / 'progress.json'} is damaged ({one_line(error)}): remove {part} to begin again"
        ) from None
    if config.input is not None:
        here = find_local_files(config, part.parent)
        position.folder = here.folder
        missing = set(position.names) - set(here.names)
        if missing:
            raise UserError(
                f"{min(missing)} is no longer in {here.folder}: put it back, or remove {part} to "
                "begin again"
            )
    return position


def check_position(config, position):
    """Raises ValueError if position cannot be one of a run with config."""
    names = position.names
    if names != sorted(set(names)) or position.file > len(names):
        raise ValueError("its names are not sorted, or fewer than the files that are done")
    if config.input is not None:
        return  # read_position() compares the names with those that are there
    schema.check(names, [schema.base_name], "names")
    if position.folder not in folders_of(config):
        raise ValueError(f"folder is {position.folder!r:.40}")


def folders_of(config):
    """The folders of the repository that may hold the split. The second holds a part of it."""
    return f"{config.subset}/{config.split}", f"{config.subset}/partial-{config.split}"


def prepare(config, part, tokenizer, about):
    """Writes the data set, from where an earlier run was interrupted. Returns its meta."""
    hub = None
    if config.input is None:
        hub = Hub(config)
    progress = None
    if continues(config):
        progress = find_unfinished(part, about, config.overwrite)
    if progress is not None:
        position = read_position(config, progress, part)
        if hub is not None:
            about = dict(about, commit=progress["about"]["commit"])
    elif hub is not None:
        commit, position = hub.find_files()
        about = dict(about, commit=commit)
    else:
        position = find_local_files(config, part.parent)
    if progress is None:
        shutil.rmtree(part, ignore_errors=True)
    writer = DatasetWriter(part, tokenizer, about, config.tokens_per_file, progress)
    try:
        writer.save(asdict(position))
        write_files(config, hub, writer, position)
        return writer.finish(
            asdict(position), "take more text, or another --val_fraction, with --overwrite=True",
            config.overwrite,
        )
    except UserError as error:
        if writer.n_tokens == 0 and not isinstance(error, Unreachable):
            writer.discard()  # there is nothing to continue
        raise


def continues(config):
    """Whether earlier work on the same data set counts. With overwrite, local files of equal names
    may have other content."""
    return config.input is None or not config.overwrite


def describe(config, tokenizer):
    """The fields of meta.json that settings decide. A data set is the same if these are."""
    source = dict(repo=config.repo, subset=config.subset, split=config.split)
    if config.input is not None:
        source = dict(input=Path(config.input).resolve().name)
    for key in ("column", "max_tokens", "val_fraction", "tokens_per_file"):
        source[key] = getattr(config, key)
    about = dict(source=source, **tokenizer.describe())
    if config.input is None and config.revision is not None:
        about["commit"] = config.revision
    return about


def damaged(data_dir):
    """Whether a finished data set has other bytes than its meta.json says. Reads all of them."""
    try:
        Dataset(data_dir.resolve()).verify()
    except UserError:
        return True
    return False


@program
def main(argv):
    config = build(HubConfig, parse(HubConfig, argv, __doc__))
    needed = ["pyarrow"]
    if config.input is None:
        needed.append("huggingface_hub")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install pyarrow huggingface_hub")
    data_dir = Path(config.data_dir or Path(__file__).parent)
    tokenizer = open_tokenizer(config.tokenizer)
    about = describe(config, tokenizer)
    meta = None
    if continues(config):
        meta = find_finished(data_dir, about, config.overwrite)
    if meta is not None and damaged(data_dir):
        print(f"{data_dir} is damaged: preparing it again", flush=True)
        if config.input is None and config.revision is None:
            config.revision = meta.get("commit")  # the same text, not the newest
            about = describe(config, tokenizer)
        meta = None
    if meta is not None:
        print(f"{data_dir} already holds this data set")
    else:
        try:
            # two processes would write to the same files
            busy = (f"another process prepares {data_dir}: wait until it has ended, or pass "
                    "another --data_dir")
            with created(data_dir, "data_dir"), lock(data_dir, busy, 0, "data_dir"):
                meta = prepare(config, data_dir / "hub.part", tokenizer, about)
                (data_dir / ".lock").unlink()  # a finished data set has its own files alone
        except OSError as error:
            raise cannot_write(data_dir, error) from None
    print_counts(data_dir, meta)


if __name__ == "__main__":
    main()
