"""Writes data sets, for every data/*/prepare.py.

A data set is a folder of .bin files (raw uint16 or uint32 token ids) and one meta.json, which lists
the files of each split with their token and byte counts. Every document ends with the end-of-text
token.
"""
import contextlib
import fnmatch
import hashlib
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from nanogqa import schema
from nanogqa.configurator import UserError, one_line, plural
from nanogqa.dataloader import (
    FILES,
    SPLITS,
    Split,
    combined_sha256,
    file_name,
    file_sha256,
    read_meta,
)
from nanogqa.files import created, sync, write_json
from nanogqa.tokenizer import (
    HF_CONFIG,
    HF_TOKENIZER,
    HuggingFaceTokenizer,
    copy_tokenizer,
    encode_text,
    get_tokenizer,
)

PROGRESS = {  # what DatasetWriter.save() writes
    "about": {str: (dict, list, str, int, float, type(None))},
    "position": dict,
    "splits": {"train": FILES, "val": FILES},
}


@dataclass
class PrepareConfig:
    tokenizer: str = "byte"       # byte, a tiktoken encoding, or a folder with a tokenizer.json
    input: str | None = None      # text: a file or folder; python: a folder; shakespeare: the file
    data_dir: str | None = None   # folder for the data set; None: the folder of the script
    overwrite: bool = False       # replace the data set in data_dir with another one


# -- input -----------------------------------------------------------------------------------------

DATA_FILE = re.compile(r"(train|val)(_\d{5,})?\.bin")
OUTPUT = re.compile(rf"\.lock|(meta\.json|tokenizer(_config)?\.json|{DATA_FILE.pattern})(\.part)?")
PART = re.compile(r"hub\.part|\..+\.part")  # folders of unfinished data sets


def input_files(folder, pattern, data_dir):
    """{path relative to folder: path} of all files below folder that match pattern, sorted.

    Output is never input: the files of a data set, finished or not, are left out. Raises UserError
    if a folder cannot be read.
    """
    def stop(error):
        if not isinstance(error, FileNotFoundError):  # there are no files then
            raise error

    files = {}
    try:
        for parent, _, names in os.walk(folder, onerror=stop):
            for name in fnmatch.filter(names, pattern):
                path = Path(parent) / name
                relative = path.relative_to(folder)
                in_part = any(PART.fullmatch(part) for part in relative.parts[:-1])
                if path.is_file() and not in_part and not is_output(path, data_dir):
                    files[relative.as_posix()] = path
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): fix its permissions, or "
                        "move it elsewhere") from None
    return dict(sorted(files.items()))


def is_output(path, data_dir):
    """Whether path is a file of the data set in data_dir, or of another data set."""
    if not OUTPUT.fullmatch(path.name):
        return False
    others = (path.parent / "meta.json").exists() and (path.parent / "val.bin").exists()
    return others or path.parent.resolve() == Path(data_dir).resolve()


def documents_of_files(files, read, wanted):
    """Yields (split, text) for each of files, {name: path}, which held_out chooses for a split.

    read(path) is the text of a file. Those for which it raises ValueError are skipped, and their
    number is printed with what was wanted instead.
    """
    val = held_out(files, read)
    skipped = []
    for name, path in files.items():
        try:
            text = read(path)
        except ValueError:
            skipped.append(name)
            continue
        split = "train"
        if name in val:
            split = "val"
        yield split, text
    print_skipped(skipped, wanted)


def held_out(files, read):
    """The names of the validation part of files, {name: path}: a tenth, at least one, those with
    the smallest sha256 of the name, and as many more as it takes until one has text.

    The choice does not depend on the order of files.
    """
    ranked = sorted(files, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    count = max(1, len(ranked) // 10)
    for number, name in enumerate(ranked, 1):
        if has_text(files[name], read):
            return set(ranked[:max(count, number)])
    return set(ranked[:count])


def has_text(path, read):
    try:
        return read(path) != ""
    except ValueError:
        return False


def print_skipped(names, wanted):
    """Prints how many files were skipped because they are not what is wanted, if any were."""
    if names:
        more = ""
        if len(names) > 1:
            more = ", ..."
        print(f"skipped because not {wanted}: {plural(len(names), 'file')} ({names[0]}{more})")


# -- tokenizer -------------------------------------------------------------------------------------

@dataclass
class DataTokenizer:
    name: str         # as in meta.json
    folder: str       # where its tokenizer.json is, if it has one
    encoding: object  # tiktoken.Encoding or HuggingFaceTokenizer

    def describe(self):
        """The tokenizer's fields of meta.json."""
        dtype = "uint32"
        if self.encoding.n_vocab <= 2**16:
            dtype = "uint16"
        return dict(tokenizer=self.name, vocab_size=self.encoding.n_vocab, dtype=dtype)


def open_tokenizer(tokenizer):
    """The DataTokenizer for byte, the name of a tiktoken encoding, or a folder with a
    tokenizer.json."""
    # gpt2 is the encoding even where there is such a folder, which is ./gpt2
    named = tokenizer in ("byte", *tiktoken.list_encoding_names())
    if not named and (Path(tokenizer) / HF_TOKENIZER).exists():
        encoding = HuggingFaceTokenizer(tokenizer)
        return DataTokenizer(encoding.name, tokenizer, encoding)
    if tokenizer == "none" or tokenizer.startswith(HF_TOKENIZER):  # names in meta.json
        raise UserError(
            f"tokenizer={tokenizer} names no tokenizer: choose byte, a tiktoken encoding, or the "
            f"folder of a {HF_TOKENIZER}"
        )
    return DataTokenizer(tokenizer, "", get_tokenizer(tokenizer))


@dataclass
class NoText:
    """Takes the place of a tokenizer where token ids stand for no text."""
    n_vocab: int
    eot_token: int    # ends each sequence


# -- writing ---------------------------------------------------------------------------------------

class DatasetWriter:
    """Writes a data set: add() takes documents, finish() publishes the files.

    Until finish() the files are in the folder part, and what data_dir (its parent) holds stays
    valid. After save() a killed run can continue: pass what find_unfinished() returned as progress.

    about: the fields of meta.json other than sha256 and splits, with those of the tokenizer.
    tokens_per_file: a train file ends with the document that reaches this; None: one train.bin.
    """

    def __init__(self, part, tokenizer, about, tokens_per_file=None, progress=None):
        self.part = Path(part)
        self.data_dir = self.part.parent
        self.tokenizer = tokenizer
        self.about = about
        self.dtype = np.dtype(about["dtype"]).newbyteorder("<")
        self.eot = np.array([tokenizer.encoding.eot_token], dtype=self.dtype)
        self.tokens_per_file = tokens_per_file
        self.splits = dict(train=[], val=[])  # as in meta.json
        self.open = {}                        # split -> (last file, its sha256 so far)
        self.n_tokens = 0                     # written so far, in all files
        refuse_links(self.part)
        self.part.mkdir(parents=True, exist_ok=True)
        if progress is not None:
            for split in SPLITS:
                self.resume(split, progress["splits"][split])

    def resume(self, split, files):
        """Checks the split's files and opens the last one if it is not complete."""
        for entry in files:
            if entry["name"] != self.next_name(split) or not self.is_sound(entry):
                raise UserError(
                    f"{self.part} does not hold the files that its progress.json lists: remove "
                    f"{self.part} to begin again"
                )
            known = ("name", "tokens", "bytes", "sha256")
            self.splits[split].append({key: entry[key] for key in known if key in entry})
            self.n_tokens += entry["tokens"]
        if self.splits[split] and "sha256" not in self.splits[split][-1]:
            self.open_last(split)

    def is_sound(self, entry):
        """Whether a file holds the tokens that its entry lists."""
        path = self.part / entry["name"]
        if path.is_file():
            size = path.stat().st_size
            wanted = entry["tokens"] * self.dtype.itemsize
            return size == wanted or (size > wanted and "sha256" not in entry)
        moved = self.data_dir / entry["name"]  # by a run that was killed in finish()
        if "sha256" in entry and moved.is_file():
            return file_sha256(moved) == entry["sha256"]
        return entry["tokens"] == 0

    def add(self, split, ids, n_bytes):
        """Appends a document: its ids without end-of-text, and the size of its text in bytes."""
        if split not in self.open:
            self.begin_file(split)
        raw = np.concatenate([np.asarray(ids, dtype=self.dtype), self.eot]).tobytes()
        file, digest = self.open[split]
        file.write(raw)
        digest.update(raw)
        entry = self.splits[split][-1]
        entry["tokens"] += len(ids) + 1
        entry["bytes"] += n_bytes
        self.n_tokens += len(ids) + 1
        in_parts = split == "train" and self.tokens_per_file is not None
        if in_parts and entry["tokens"] >= self.tokens_per_file:
            self.close(split)

    def next_name(self, split):
        """The name of the split's next file."""
        part = None
        if split == "train" and self.tokens_per_file is not None:
            part = len(self.splits[split])
        return file_name(split, part)

    def begin_file(self, split):
        self.splits[split].append(dict(name=self.next_name(split), tokens=0, bytes=0))
        self.open_last(split)

    def open_last(self, split):
        """Opens the split's last file at its recorded length, without what was written later."""
        entry = self.splits[split][-1]
        left = entry["tokens"] * self.dtype.itemsize
        digest = hashlib.sha256()
        path = self.part / entry["name"]
        path.touch()
        file = open(path, "r+b")
        while left:
            chunk = file.read(min(left, 2**24))
            digest.update(chunk)
            left -= len(chunk)
        file.truncate(file.tell())
        self.open[split] = (file, digest)

    def close(self, split):
        """Ends the split's last file and records its sha256."""
        file, digest = self.open.pop(split)
        sync(file)
        file.close()
        self.splits[split][-1]["sha256"] = digest.hexdigest()

    def save(self, position):
        """Records in progress.json that all documents up to position, a dict, are written."""
        for file, _ in self.open.values():
            sync(file)
        progress = dict(about=self.about, position=position, splits=self.splits)
        write_json(self.part / "progress.json", progress)

    def discard(self):
        """Closes and deletes everything that is not published."""
        for file, _ in self.open.values():
            with contextlib.suppress(OSError):  # a full disk: what is buffered is not needed
                file.close()
        shutil.rmtree(self.part, ignore_errors=True)

    def finish(self, position=None, if_empty="give more text", overwrite=False):
        """Moves the files to data_dir, meta.json last. Returns meta.

        position is saved first, if given; after a kill finish() may then be called again. A data
        set in data_dir that has the same content stays as it is. Raises UserError if it has other
        content, unless overwrite, or if a split has no text, with the remedy if_empty.
        """
        for split in list(self.open):
            self.close(split)
        if position is not None:
            self.save(position)
        for split in SPLITS:
            if sum(file["bytes"] for file in self.splits[split]) == 0:
                raise UserError(f"no text for the {split} split: {if_empty}")
        if not overwrite:
            meta = self.find_same()
            if meta is not None:
                shutil.rmtree(self.part)
                return meta
        meta = dict(self.about, sha256=combined_sha256(self.splits, self.about), splits=self.splits)
        names = [file["name"] for split in SPLITS for file in self.splits[split]]
        names += self.copy_tokenizer() + ["meta.json"]
        write_json(self.part / "meta.json", meta)
        remove_old(self.data_dir, names)  # from here on nothing needs room on the disk
        for name in names:
            if (self.part / name).exists():  # else moved by a run that was killed here
                os.replace(self.part / name, self.data_dir / name)
        shutil.rmtree(self.part)
        return meta

    def find_same(self):
        """The meta of the data set in data_dir if it has the content of this one.

        None if there is none, or a damaged one. Raises UserError if it has other content.
        """
        meta = find_finished(self.data_dir, self.about)
        if meta is None:
            return None
        found = {}
        for split in SPLITS:
            found[split] = []
            for file in meta["splits"][split]:
                digest = file_sha256(self.data_dir / file["name"])
                found[split].append(dict(name=file["name"], sha256=digest))
        wanted = combined_sha256(self.splits, self.about)
        if combined_sha256(found, meta) == wanted:
            print(f"{self.data_dir} already holds this data set")
            return meta
        if meta["sha256"] == wanted:
            return None  # the same content is wanted, but the files there are damaged
        raise UserError(
            f"{self.data_dir} holds a data set with other content: pass another --data_dir, or "
            "--overwrite=True"
        )

    def copy_tokenizer(self):
        """Copies the files of a tokenizer.json into part. Returns their names."""
        names = [HF_TOKENIZER, HF_CONFIG]
        for name in names:
            (self.part / name).unlink(missing_ok=True)  # a run that was killed left half of it
        copy_tokenizer(self.tokenizer.name, self.tokenizer.folder, self.part)
        return names


def remove_old(data_dir, kept):
    """Deletes the data set in data_dir: its meta.json, and its files except those named in kept."""
    try:
        splits = read_meta(data_dir)["splits"]
    except UserError:
        splits = dict(train=[], val=[])
    for split in SPLITS:
        for file in splits[split]:
            if file["name"] not in kept:
                (data_dir / file["name"]).unlink(missing_ok=True)
    (data_dir / "meta.json").unlink(missing_ok=True)


def refuse_links(part):
    """Raises UserError if the folder part is or holds a symbolic link, which writing would follow.
    """
    for path in (part, *part.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link: remove {part} to begin again")


def print_counts(data_dir, meta):
    """Prints the tokens of each split and the hash: the last lines of every prepare.py."""
    for files in meta["splits"].values():
        names = files[0]["name"]
        if len(files) > 1:
            names += f" to {files[-1]['name']}"
        tokens = sum(file["tokens"] for file in files)
        text = ""
        if meta["tokenizer"] != "none":
            text = f" from {sum(file['bytes'] for file in files):,} bytes of text"
        print(f"{Path(data_dir) / names}: {tokens:,} tokens{text}")
    print(
        f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids, "
        f"content sha256 {meta['sha256'][:16]}"
    )


def write_dataset(documents, data_dir, tokenizer, overwrite=False, **about):
    """Tokenizes documents, pairs of split ("train" or "val") and text, into data_dir.

    about is added to meta.json. On an error the data set in data_dir stays as it was. Prints the
    counts.
    """
    opened = open_tokenizer(tokenizer)
    write_encoded(encode(documents, opened.encoding), data_dir, opened, about, overwrite)


def encode(documents, encoding):
    """Yields (split, ids, size of the text in bytes) for each (split, text)."""
    for split, text in documents:
        yield split, encode_text(encoding.encode_ordinary, text), len(text.encode())


def write_encoded(encoded, data_dir, opened, about, overwrite=False):
    """As write_dataset, for triples that encode() yields and a DataTokenizer; about is a dict."""
    data_dir = Path(data_dir)
    about = {**about, **opened.describe()}
    find_finished(data_dir, about, overwrite)  # refuses other settings before the work
    try:
        with created(data_dir, "data_dir"):
            remove_dead_parts(data_dir)
            # named by process and machine: several may prepare at once, also on a shared disk
            part = data_dir / f".{socket.gethostname()}-{os.getpid()}.part"
            writer = DatasetWriter(part, opened, about)
            try:
                for document in tqdm(encoded, "writing", unit=" documents", disable=None):
                    writer.add(*document)
                meta = writer.finish(if_empty="give more text with --input", overwrite=overwrite)
            finally:
                writer.discard()
    except OSError as error:
        raise cannot_write(data_dir, error) from None
    print_counts(data_dir, meta)


def cannot_write(data_dir, error):
    return UserError(
        f"cannot write the data set to {data_dir} ({error.strerror}): pass another --data_dir"
    )


# -- what an earlier run left ----------------------------------------------------------------------

def remove_dead_parts(data_dir):
    """Deletes the part folders in data_dir of processes of this machine that no longer run."""
    name = re.compile(rf"\.{re.escape(socket.gethostname())}-(\d{{1,9}})\.part")
    for part in data_dir.glob(".*.part"):
        match = name.fullmatch(part.name)
        if match and not is_running(int(match[1])):
            shutil.rmtree(part, ignore_errors=True)


def is_running(process_id):
    try:
        os.kill(process_id, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def find_finished(data_dir, about, overwrite=False):
    """The meta of the complete data set in data_dir; None if there is none, or it is damaged.

    Raises UserError if its fields are not those of about, or if data_dir holds files of another
    program under the names of a data set, unless overwrite: then None.
    """
    try:
        meta = read_meta(data_dir)
    except UserError:
        if not overwrite:
            refuse_foreign(data_dir)
        return None
    if about.items() <= meta.items():
        try:
            for split in SPLITS:
                Split(data_dir, split, meta)
            return meta
        except UserError:
            return None
    if not overwrite:
        raise UserError(
            f"{data_dir} holds a data set with other settings ({differences(about, meta)}): pass "
            "another --data_dir, or --overwrite=True"
        )
    return None


def differences(about, there):
    """The fields of about that are others in there, as text with both values."""
    found = []
    for key, value in about.items():
        if there.get(key) != value:
            found.append(f"{key} {there.get(key)!r:.60}, not {value!r:.60}")
    return one_line("; ".join(found))


def refuse_foreign(data_dir):
    """Raises UserError if data_dir holds a meta.json that lists no splits, or none and files named
    as those of a data set, as other programs write. A killed run may leave such files too, but
    beside its part folder."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        return
    if (data_dir / "meta.json").exists():
        if is_foreign(data_dir / "meta.json"):
            raise UserError(
                f"{data_dir / 'meta.json'} is of another program: pass another --data_dir, or "
                "--overwrite=True to replace it"
            )
        return
    names = sorted(path.name for path in data_dir.iterdir())
    unfinished = any(PART.fullmatch(name) for name in names)
    taken = [name for name in names if DATA_FILE.fullmatch(name)]
    if taken and not unfinished:
        raise UserError(
            f"{data_dir} holds {taken[0]}, but no meta.json: pass another --data_dir, or "
            "--overwrite=True to replace it"
        )


def is_foreign(path):
    """Whether a meta.json is valid JSON, but not that of a data set."""
    try:
        content = schema.read_json(path, object)
    except (OSError, ValueError):
        return False  # damaged: it is written again
    return not isinstance(content, dict) or "splits" not in content


def find_unfinished(part, about, overwrite=False):
    """What a DatasetWriter that was killed saved in the folder part; None if there is nothing.

    The result has "about", "position" and "splits". The caller checks its own position.
    Raises UserError if it is damaged, or has other settings than about and not overwrite.
    """
    path = Path(part) / "progress.json"
    try:
        progress = schema.read_json(path, PROGRESS)
        for split in SPLITS:
            for file in progress["splits"][split][:-1]:  # the last one may be incomplete
                schema.check(file, {"sha256": schema.sha256})
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}): remove {part} to begin again") from None
    if about.items() <= progress["about"].items():
        return progress
    if any(progress["splits"].values()) and not overwrite:
        raise UserError(
            f"{part} holds an unfinished data set with other settings "
            f"({differences(about, progress['about'])}): pass those settings to continue, another "
            "--data_dir, or --overwrite=True"
        )
    return None


