"""The writer behind every data/*/prepare.py.

A data set is a folder of .bin files (raw uint16 or uint32 token ids, one after another) and one meta.json, which lists
the files of each split with their token and byte counts. Every document ends with the end-of-text token.
"""
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanogqa.configurator import UserError
from nanogqa.dataloader import Split, read_meta
from nanogqa.files import sync, write_json
from nanogqa.tokenizer import HF_TOKENIZER, HuggingFaceTokenizer, copy_tokenizer, get_tokenizer


@dataclass
class PrepareConfig:
    tokenizer: str = "byte"       # byte, the name of any tiktoken encoding (gpt2, cl100k_base, ...), or a folder with a tokenizer.json
    input: str | None = None      # a text file, or a folder of them, to read instead of the usual source
    data_dir: str | None = None   # folder that receives the .bin files and meta.json; None: that of the script
    overwrite: bool = False       # replace a data set of another tokenizer


def held_out(names):
    """The tenth of the names, at least one, that validates: those whose sha256 is smallest, whatever their order."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ranked[:max(1, len(ranked) // 10)])


def open_tokenizer(tokenizer, data_dir, overwrite=False):
    """Name, encoding and dtype of the ids of tokenizer, a name or a folder, which is to write a data set to data_dir.

    UserError where a data set of another tokenizer is there, unless overwrite.
    """
    name = HuggingFaceTokenizer(tokenizer).name if os.path.exists(os.path.join(tokenizer, HF_TOKENIZER)) else tokenizer
    if (Path(data_dir) / "meta.json").exists() and not overwrite:
        try:
            there = read_meta(data_dir)["tokenizer"]
        except UserError:
            there = name  # a damaged data set is mended by making it again
        if there != name:
            raise UserError(f"{data_dir} holds a data set of tokenizer {there!r}: pass another --data_dir, or --overwrite=True")
    encoding = get_tokenizer(name, tokenizer)
    return name, encoding, np.dtype("uint16" if encoding.n_vocab <= 2**16 else "uint32").newbyteorder("<")


def print_counts(data_dir, meta):
    """The last lines of every prepare.py: the tokens of each split, and the hash."""
    for files in meta["splits"].values():
        names = files[0]["name"] + (f" to {files[-1]['name']}" if len(files) > 1 else "")
        tokens, size = (sum(file[count] for file in files) for count in ("tokens", "bytes"))
        print(f"{Path(data_dir) / names}: {tokens:,} tokens from {size:,} bytes of text")
    print(f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids, content sha256 {meta['sha256'][:16]}")


def write_dataset(documents, data_dir, tokenizer, overwrite=False, **about):
    """Tokenizes documents, pairs of split ("train" or "val") and text, into data_dir; about is added to meta.json.

    The files take their names only when all are complete, meta.json last. Prints the counts.
    """
    data_dir = Path(data_dir)
    name, encoding, dtype = open_tokenizer(tokenizer, data_dir, overwrite)
    part = f".{os.getpid()}.part"
    splits = {split: [dict(name=f"{split}.bin", tokens=0, bytes=0)] for split in ("train", "val")}
    digest = hashlib.sha256()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        files = {split: open(data_dir / f"{split}.bin{part}", "wb") for split in splits}
        for split, text in tqdm(documents, desc="tokenizing", unit=" documents", disable=None):
            ids = np.array([*encoding.encode_ordinary(text), encoding.eot_token], dtype=dtype)
            files[split].write(ids.tobytes())
            digest.update(f"{split} {len(ids)} ".encode() + ids.tobytes())
            splits[split][0]["tokens"] += len(ids)
            splits[split][0]["bytes"] += len(text.encode())
        for split, file in files.items():
            file.close()
            if not splits[split][0]["bytes"]:
                raise UserError(f"no text for the {split} split: give more text with --input")
        meta = dict(about, tokenizer=name, vocab_size=encoding.n_vocab, dtype=dtype.name, sha256=digest.hexdigest(),
                    splits=splits)
        (data_dir / f"meta.json{part}").write_text(json.dumps(meta, indent=1))
        copy_tokenizer(name, tokenizer, data_dir)
        for file in ("train.bin", "val.bin", "meta.json"):
            os.replace(data_dir / f"{file}{part}", data_dir / file)
    except OSError as error:
        raise UserError(f"cannot write the data set to {data_dir} ({error.strerror}): pass another --data_dir") from None
    finally:
        for left in data_dir.glob(f"*{part}"):
            left.unlink()
    print_counts(data_dir, meta)


class ShardWriter:
    """Writes a data set of many files that a kill does not undo: the .bin files in folder and progress.json beside them,
    which save() writes and which says how far they are valid. state is its content: about, splits, and whatever the caller adds.
    A file of the train split ends with the document that reaches tokens_per_file."""

    def __init__(self, folder, state, eot, dtype, tokens_per_file):
        self.folder, self.state, self.dtype, self.tokens_per_file = folder, state, dtype, tokens_per_file
        self.eot, self.open, self.saved = np.array([eot], dtype=dtype), {}, time.monotonic()
        for split, files in state["splits"].items():
            if files and "sha256" not in files[-1]:
                self.start(split)

    def start(self, split):
        """Opens the split's last file at its recorded length; what a killed run wrote after it is cut off."""
        about, digest = self.state["splits"][split][-1], hashlib.sha256()
        path, left = self.folder / about["name"], about["tokens"] * self.dtype.itemsize
        if left and (not path.exists() or path.stat().st_size < left):
            raise UserError(f"{path} is shorter than progress.json says: remove {self.folder} to begin again")
        file = open(path, "r+b" if left else "wb")
        while left:
            digest.update(chunk := file.read(min(left, 2**24)))
            left -= len(chunk)
        file.truncate(file.tell())
        self.open[split] = file, digest

    def add(self, split, ids, n_bytes):
        """A document of n_bytes bytes of text; end-of-text is added."""
        files = self.state["splits"][split]
        if split not in self.open:
            files.append(dict(name=f"train_{len(files):05d}.bin" if split == "train" else "val.bin", tokens=0, bytes=0))
            self.start(split)
        raw = np.concatenate([np.asarray(ids, dtype=self.dtype), self.eot]).tobytes()
        file, digest = self.open[split]
        file.write(raw)
        digest.update(raw)
        files[-1]["tokens"] += len(ids) + 1
        files[-1]["bytes"] += n_bytes
        if split == "train" and files[-1]["tokens"] >= self.tokens_per_file:
            self.close(split)

    def close(self, split):
        file, digest = self.open.pop(split)
        sync(file)
        file.close()
        self.state["splits"][split][-1]["sha256"] = digest.hexdigest()

    def save(self, **changes):
        self.state.update(changes)
        for file, _ in self.open.values():
            sync(file)
        write_json(self.folder / "progress.json", self.state)
        self.saved = time.monotonic()

    def finish(self):
        for split in [*self.open]:
            self.close(split)
        self.save(finished=True)


def find_finished(data_dir, about, overwrite=False):
    """The meta of the whole data set in data_dir that has about in it; None where there is none, or it is damaged.

    UserError where another one is there, unless overwrite.
    """
    try:
        meta = read_meta(data_dir)
    except UserError:
        return None
    if about.items() <= meta.items():
        try:
            return meta if all(Split(data_dir, split, meta) for split in ("train", "val")) else None
        except UserError:
            return None
    if not overwrite:
        raise UserError(f"{data_dir} holds a data set of other settings: pass another --data_dir, or --overwrite=True")


def find_unfinished(folder, about, overwrite=False):
    """The state of the ShardWriter that was killed in folder; None where there is nothing.

    UserError where what is there is damaged, or of another about, unless overwrite.
    """
    try:
        state = json.loads((folder / "progress.json").read_text())
        if state["about"] == about:
            return state
        if any(state["splits"].values()) and not overwrite:
            raise UserError(f"{folder} holds an unfinished data set of other settings: pass those to go on, another "
                            "--data_dir, or --overwrite=True")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'progress.json'} is damaged: remove {folder} to begin again") from None


def publish(folder, data_dir, about, splits):
    """Moves what a ShardWriter finished in folder to data_dir in place of what is there, meta.json last; returns that.

    May be called again after a kill. The set's sha256 is that of the lines sha256sum prints for its files, train first.
    """
    files = [*splits["train"], *splits["val"]]
    lines = "".join(f"{file['sha256']}  {file['name']}\n" for file in files)
    meta = dict(about, sha256=hashlib.sha256(lines.encode()).hexdigest(), splits=splits)
    try:
        old = {file["name"] for split in read_meta(data_dir)["splits"].values() for file in split}
    except UserError:
        old = set()
    (data_dir / "meta.json").unlink(missing_ok=True)
    for name in {file["name"] for file in files} | old:
        if (folder / name).exists():  # not so where a former run was killed in the middle of this
            os.replace(folder / name, data_dir / name)
        elif name in old:
            (data_dir / name).unlink(missing_ok=True)
    write_json(data_dir / "meta.json", meta)
    shutil.rmtree(folder)
    return meta
