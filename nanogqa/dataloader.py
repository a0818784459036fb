"""The reader behind training: a data set's splits, shuffled training windows, fixed validation windows."""
import bisect
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken

from nanogqa.configurator import UserError, world
from nanogqa.tokenizer import HF_TOKENIZER

DATA = Path(__file__).resolve().parents[1] / "data"
SCANNED = 2**24  # tokens at the start of a split that are checked when it is opened; the rest is checked as it is read


def read_meta(folder):
    """The checked content of a data set's meta.json."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        sound = meta["dtype"] in ("uint16", "uint32") and type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] <= 2**32
        known = meta["tokenizer"].startswith(HF_TOKENIZER) or meta["tokenizer"] in ("byte", *tiktoken.list_encoding_names())
        sound &= known and isinstance(meta["sha256"], str)
        for split in ("train", "val"):
            for file in meta["splits"][split]:
                sound &= file["name"] == os.path.basename(file["name"]) and all(
                    type(file[count]) is int and 0 <= file[count] < 2**62 for count in ("tokens", "bytes"))
            sound &= sum(file["bytes"] for file in meta["splits"][split]) > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not the meta.json of a data set: {mend(folder)}")
    return meta


def mend(folder):
    """The command that makes the data set in that folder."""
    script = Path(folder) / "prepare.py"
    return f"run python {os.path.relpath(script)}" if script.exists() else "make it again with its prepare.py"


class Split:
    """One split of a data set, read as windows of tokens."""

    def __init__(self, folder, name, meta):
        self.folder, self.vocab_size, self.dtype = Path(folder), meta["vocab_size"], np.dtype(meta["dtype"]).newbyteorder("<")
        self.files = meta["splits"][name]
        self.ends = list(itertools.accumulate(file["tokens"] for file in self.files))  # where each file ends in the split
        self.n_tokens = self.ends[-1] if self.ends else 0
        self.n_bytes = sum(file["bytes"] for file in self.files)
        for i, file in enumerate(self.files):
            path, wanted = self.folder / file["name"], file["tokens"] * self.dtype.itemsize
            size = path.stat().st_size if path.is_file() else -1
            if size != wanted:
                state = f"has {size:,} bytes where meta.json promises {wanted:,}" if size >= 0 else "is missing"
                raise UserError(f"{path} {state}: {mend(folder)}")
            if (start := self.ends[i] - file["tokens"]) < SCANNED:
                self.check(self.read(i, 0, SCANNED - start))

    def read(self, i, at, count):
        """Tokens [at, at + count) of file i, or those up to its end. A map of the file would read ahead megabytes for each."""
        path, count = self.folder / self.files[i]["name"], min(count, self.files[i]["tokens"] - at)
        ids = np.fromfile(path, self.dtype, count, offset=at * self.dtype.itemsize)
        if len(ids) < count:
            raise UserError(f"{path} has become shorter: {mend(self.folder)}")
        return ids

    def check(self, ids):
        """ids, none of which may lie beyond the vocabulary."""
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(f"{self.folder} holds token id {ids.max()}, but its vocabulary ends at {self.vocab_size - 1}: "
                            f"{mend(self.folder)}")
        return ids

    def windows(self, starts, length):
        """Tokens [start, start + length) of the split for each start, across its files: int64 (len(starts), length)."""
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, starts):
            filled = 0
            while filled < length:
                i = bisect.bisect_right(self.ends, start + filled)  # the file that holds this token; never an empty one
                part = self.read(i, start + filled - self.ends[i] + self.files[i]["tokens"], length - filled)
                row[filled:filled + len(part)] = part
                filled += len(part)
        return self.check(out)


class Dataset:
    """A prepared data set: name is a folder below data/, or the path of one. Splits train and val, and its meta."""

    def __init__(self, name):
        self.folder = find(name)
        if not (self.folder / "meta.json").exists():
            raise UserError(f"data set {name!r} is not prepared: {mend(self.folder)}")
        self.meta = read_meta(self.folder)
        self.train, self.val = (Split(self.folder, split, self.meta) for split in ("train", "val"))


def find(name):
    """The folder of the data set called name."""
    for folder in (DATA / name, Path(name)):
        if folder.is_dir():
            return folder
    known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    raise UserError(f"there is no data set {name!r}: choose one of {', '.join(known)}, or the path of a prepared folder")


def keyed(*key):
    """A 63-bit number that looks random and depends on the key alone, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def shuffled(index, n, key):
    """The index-th element of a pseudo-random permutation of range(n), computed without storing it.

    A four-round Feistel network permutes the smallest range of 4^k that holds n; where it lands beyond n it is applied
    again until it does not (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = 2**half - 1
    while True:
        left, right = index >> half, index & low
        for round in range(4):
            mixed = ((right + round + 1) * 0x9E3779B97F4A7C15 ^ key) * 0xBF58476D1CE4E5B9 % 2**64
            left, right = right, left ^ (mixed >> 40) & low
        index = left << half | right
        if index < n:
            return index


def train_batch(split, seed, first, count, block_size):
    """Inputs and targets, int64 (count, block_size) each, of the training sequences first, first + 1, ... of a run.

    A pure function of its arguments. Each epoch cuts the split into blocks, from an offset of its own, and visits each
    once in an order of its own; a target is the token after its input.
    """
    n_blocks = max(1, (split.n_tokens - block_size) // block_size)
    spare = min(block_size, split.n_tokens - n_blocks * block_size)  # offsets at which n_blocks blocks still fit
    starts = []
    for sequence in range(first, first + count):
        epoch, index = divmod(sequence, n_blocks)
        offset = keyed(seed, epoch, "offset") % spare
        block = shuffled(index, n_blocks, keyed(seed, epoch, "order"))
        starts.append(offset + block * block_size)
    windows = split.windows(starts, block_size + 1)
    return windows[:, :-1], windows[:, 1:]


def val_windows(split, block_size, eval_tokens=None):
    """Starts of the validation windows: all of the split, or as many as eval_tokens fills, evenly spaced."""
    n_windows = -(-(split.n_tokens - 1) // block_size)
    count = n_windows if eval_tokens is None else min(n_windows, max(1, eval_tokens // block_size))
    return [i * n_windows // count * block_size for i in range(count)]


def val_batch(split, starts, rows, block_size):
    """Inputs and targets (rows, block_size) of the windows at starts; targets that do not exist are -1."""
    x = np.zeros((rows, block_size), dtype=np.int64)
    y = np.full((rows, block_size), -1, dtype=np.int64)
    for row, start in enumerate(starts):
        n = min(block_size, split.n_tokens - 1 - start)
        window = split.windows([start], n + 1)[0]
        x[row, :n], y[row, :n] = window[:-1], window[1:]
    return x, y


def bits_per_byte(loss, split):
    """Nats per token -> bits per byte of the split's text, which compares tokenizers."""
    return loss / math.log(2) * split.n_tokens / split.n_bytes


def prepare_default(name):
    """Makes the default data set where it is not there yet: one rank of each machine does, the others wait."""
    folder = DATA / "python"
    if name != "python" or (folder / "meta.json").exists():
        return
    if world()[2] == 0:
        print("data set python is not prepared yet: running python data/python/prepare.py", flush=True)
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            raise UserError("data/python/prepare.py failed, as it says above: mend that, or choose another --dataset")
    while not (folder / "meta.json").exists():
        time.sleep(0.2)
