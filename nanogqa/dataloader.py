"""Reads data sets: their splits, shuffled training windows, fixed validation windows, and what an
evaluation reports of them."""
import bisect
import hashlib
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken

from nanogqa import schema
from nanogqa.configurator import UserError, one_line
from nanogqa.tokenizer import HF_TOKENIZER

DATA = Path(__file__).resolve().parents[1] / "data"
SPLITS = ("train", "val")
SLOW = 10**9  # bytes from which verifying them is announced; about a second each
SCANNED = 2**24  # tokens at the start of a split that are checked when it is opened


# -- meta.json -------------------------------------------------------------------------------------

# predicates of META: where one is False, the message ends in "which is not a NAME"
def type_of_ids(value):
    """A type of token ids."""
    return value in ("uint16", "uint32")


def vocabulary(value):
    """A number of token ids."""
    return schema.count(value) and 0 < value <= 2**32


def tokenizer(value):
    """The name of a tokenizer that a data set may have."""
    if not schema.short_text(value):  # no checkpoint could hold it
        return False
    known = ("none", "byte", *tiktoken.list_encoding_names())
    return value.startswith(HF_TOKENIZER) or value in known


FILES = [{
    "name": schema.base_name, "tokens": schema.count, "bytes": schema.count,
    "sha256?": schema.sha256,
}]
META = {
    "dtype": type_of_ids, "vocab_size": vocabulary, "tokenizer": tokenizer, "sha256": schema.sha256,
    "splits": {"train": FILES, "val": FILES},
    # only answers are targets: the tokens answer_distance (default: 1) places after id answer_after
    "answer_after?": schema.count, "answer_distance?": schema.positive_count,
    # windows begin where a sequence of that many tokens does
    "sequence_length?": schema.positive_count,
}
ABOUT_TARGETS = ("answer_after", "answer_distance", "sequence_length")


def file_name(split, part=None):
    """The name of a split's only file, or of one of its parts, which count from 0."""
    if part is None:
        return f"{split}.bin"
    return f"{split}_{part:05d}.bin"


def read_meta(folder):
    """The content of a data set's meta.json. Raises UserError if it is missing or not valid."""
    path = Path(folder) / "meta.json"
    try:
        meta = schema.read_json(path, META)
        for split in SPLITS:
            files = meta["splits"][split]
            names = [file["name"] for file in files]
            parts = [file_name(split, part) for part in range(len(files))]
            if names not in ([file_name(split)], parts):  # they are deleted with the data set
                raise ValueError(f"the files of the {split} split are not named {split}.bin or "
                                 f"{file_name(split, 0)}, {file_name(split, 1)} and so on")
            if sum(file["bytes"] for file in files) == 0:
                raise ValueError(f"the {split} split is empty")
        if meta.get("answer_after", 0) >= meta["vocab_size"]:
            raise ValueError("answer_after is outside the vocabulary")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the meta.json of a data set ({one_line(error)}): "
                        f"{remedy(folder)}") from None
    return meta


def remedy(folder):
    """What to do about a missing or damaged data set, as the end of an error message."""
    script = Path(folder) / "prepare.py"
    if script.exists():
        return f"run python {os.path.relpath(script)}, with its settings if it was run before"
    return "make it again with its prepare.py"


# -- data sets -------------------------------------------------------------------------------------

class Split:
    """One split of a data set: a sequence of n_tokens tokens, stored in one or more files."""

    def __init__(self, folder, name, meta):
        self.folder, self.name = Path(folder), name
        self.vocab_size = meta["vocab_size"]
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.answer_after = meta.get("answer_after")
        self.answer_distance = meta.get("answer_distance", 1)
        self.sequence_length = meta.get("sequence_length")
        self.files = meta["splits"][name]
        # ends[i]: position in the split just after the last token of file i
        self.ends = list(itertools.accumulate(file["tokens"] for file in self.files))
        self.n_tokens = self.ends[-1]
        self.n_bytes = sum(file["bytes"] for file in self.files)  # of the text
        for i in range(len(self.files)):
            self.check_size(i)
            start = self.start_of(i)
            if start < SCANNED:
                self.check_ids(self.read(i, 0, SCANNED - start))

    def start_of(self, i):
        """Position in the split of the first token of file i."""
        return self.ends[i] - self.files[i]["tokens"]

    def check_size(self, i):
        """Raises UserError if file i is missing or not as long as meta.json says."""
        path = self.folder / self.files[i]["name"]
        if not path.is_file():
            raise UserError(f"{path} is missing: {remedy(self.folder)}")
        size = path.stat().st_size
        wanted = self.files[i]["tokens"] * self.dtype.itemsize
        if size != wanted:
            raise UserError(
                f"{path} has {size:,} bytes where meta.json promises {wanted:,}: "
                f"{remedy(self.folder)}"
            )

    def read(self, i, at, count):
        """Tokens [at, at + count) of file i, or up to its end.

        Reads instead of mapping the file: a map would read ahead megabytes for each window.
        """
        path = self.folder / self.files[i]["name"]
        count = min(count, self.files[i]["tokens"] - at)
        ids = np.fromfile(path, self.dtype, count, offset=at * self.dtype.itemsize)
        if len(ids) < count:
            raise UserError(f"{path} has become shorter: {remedy(self.folder)}")
        return ids

    def check_ids(self, ids):
        """Returns ids. Raises UserError if one is outside the vocabulary."""
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.folder} holds token id {ids.max()}, but its vocabulary ends at "
                f"{self.vocab_size - 1}: {remedy(self.folder)}"
            )
        return ids

    def windows(self, starts, length):
        """Tokens [start, start + length) for each start: int64 (len(starts), length).

        A window may span files. IndexError if it extends past the end of the split.
        """
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, starts, strict=True):
            filled = 0
            while filled < length:
                position = start + filled
                i = bisect.bisect_right(self.ends, position)  # its file; never an empty one
                part = self.read(i, position - self.start_of(i), length - filled)
                row[filled:filled + len(part)] = part
                filled += len(part)
        return self.check_ids(out)

    def answer_place(self):
        """Where answers are, for messages."""
        return f"{self.answer_distance} after id {self.answer_after}"

    def inputs_and_targets(self, windows):
        """Inputs and targets, (rows, length - 1) each, of (rows, length) tokens.

        A target is the token after its input. With answer_after, all but answers are -1.
        """
        x, y = windows[:, :-1], windows[:, 1:]
        if self.answer_after is not None:
            is_answer = np.zeros(windows.shape, dtype=bool)
            is_mark = windows == self.answer_after
            is_answer[:, self.answer_distance:] = is_mark[:, :-self.answer_distance]
            y = np.where(is_answer[:, 1:], y, -1)
        return x, y


class Dataset:
    """A prepared data set: splits train and val, and meta, the content of meta.json.

    name is a folder below data/ or a path.
    """

    def __init__(self, name):
        self.name = name
        self.folder = folder_of(name)
        if not (self.folder / "meta.json").exists():
            raise UserError(f"data set {name!r} is not prepared: {remedy(self.folder)}")
        self.meta = read_meta(self.folder)
        self.answer_after = self.meta.get("answer_after")
        # which logits an evaluation needs, as in GPT.forward: answers are counted, a text is not
        self.eval_logits = "none"
        if self.answer_after is not None:
            self.eval_logits = "targets"
        self.train = Split(self.folder, "train", self.meta)
        self.val = Split(self.folder, "val", self.meta)

    def check_config(self, config):
        """Raises UserError if config's vocab_size or block_size does not fit this data set."""
        if self.meta["vocab_size"] > config.vocab_size:
            raise UserError(
                f"data set {self.name!r} has {self.meta['vocab_size']} token ids, more than "
                f"vocab_size={config.vocab_size}: raise vocab_size, or leave it out"
            )
        for split in (self.train, self.val):
            if split.n_tokens <= config.block_size:
                raise UserError(
                    f"block_size={config.block_size} needs {config.block_size + 1} tokens in each "
                    f"split, data set {self.name!r} has one of {split.n_tokens}: lower block_size, "
                    "or use more text"
                )
        length = self.train.sequence_length or 1
        if config.block_size % length:
            raise UserError(
                f"block_size={config.block_size} is not a multiple of {length}, the length of the "
                f"sequences of data set {self.name!r}: set block_size={length}"
            )
        if self.answer_after is not None:
            self.check_answers(self.train, config.block_size)
            self.check_answers(self.val, config.block_size, config.eval_tokens)

    def check_answers(self, split, block_size, eval_tokens=None):
        """Raises UserError if the windows of a split hold no answer. Reads up to the first one."""
        for start in val_windows(split, block_size, eval_tokens):
            if (val_batch(split, [start], 1, block_size)[1] >= 0).any():
                return
        what_to_do = "correct answer_after in its prepare.py"
        if eval_tokens is not None:
            what_to_do = f"raise eval_tokens, or {what_to_do}"
        raise UserError(f"{split.folder} has no answer, {split.answer_place()}, in the windows of "
                        f"its split {split.name}: {what_to_do}")

    @property
    def metric_names(self):
        """The keys of metrics()."""
        return tuple(self.metrics(0.0, 0.0))

    def metrics(self, val_loss, val_acc=None):
        """The metrics of an evaluation, as a dict: val_loss in nats per target, and where answers
        alone are targets, val_acc, the share of right ones (None: not known), otherwise val_bpb,
        the loss in bits per byte of the text."""
        if self.answer_after is not None:
            return dict(val_loss=val_loss, val_acc=val_acc)
        return dict(val_loss=val_loss, val_bpb=bits_per_byte(val_loss, self.val))

    def verify(self):
        """Raises UserError unless the files have the sha256 in meta.json. Reads all of them.

        Data sets of older versions list no sha256 of each file, so they are not verified.
        """
        files = [file for split in SPLITS for file in self.meta["splits"][split]]
        if not any("sha256" in file for file in files):
            print(f"data set {self.name} lists no sha256 of its files: not verified", flush=True)
            return
        size = sum((self.folder / file["name"]).stat().st_size for file in files)
        if size > SLOW:
            print(f"verifying the {size / 1e9:,.0f} GB of data set {self.name}", flush=True)
        for file in files:
            path = self.folder / file["name"]
            if file_sha256(path) != file.get("sha256"):
                raise UserError(f"{path} is damaged (its sha256 is not that in meta.json): "
                                f"{remedy(self.folder)}")
        if combined_sha256(self.meta["splits"], self.meta) != self.meta["sha256"]:
            raise UserError(f"{self.folder / 'meta.json'} is damaged (its sha256 is not that of its"
                            f" files): {remedy(self.folder)}")


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_sha256(splits, about):
    """The sha256 of a data set: that of the lines `sha256sum` prints for its files, train first.

    Fields of about that change the targets follow them, so that a resumed run has the same.
    """
    lines = ""
    for split in SPLITS:
        for file in splits[split]:
            lines += f"{file['sha256']}  {file['name']}\n"
    for key in ABOUT_TARGETS:
        if key in about:
            lines += f"{about[key]}  {key}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def folder_of(name):
    """The folder of the data set called name: of data/NAME and the path NAME, the first that is
    prepared, or else the first that exists."""
    folders = [folder for folder in (DATA / name, Path(name)) if folder.is_dir()]
    for folder in folders:
        if (folder / "meta.json").exists():
            return folder
    if folders:
        return folders[0]
    known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    raise UserError(
        f"there is no data set {name!r}: choose one of {', '.join(known)}, or the path of a "
        "prepared folder"
    )


def prepare_default(name, local_rank=0):
    """Prepares the default data set if name is that and it is not prepared yet.

    Local rank 0 of each machine runs the script, the other ranks wait.
    """
    folder = DATA / "python"
    if name != "python" or (folder / "meta.json").exists():
        return
    if local_rank == 0:
        print("data set python is not prepared yet: running python data/python/prepare.py",
              flush=True)
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            raise UserError(
                "data/python/prepare.py failed with the error above: fix that, or choose another "
                "--dataset"
            )
    while not (folder / "meta.json").exists():
        time.sleep(0.2)


# -- training windows ------------------------------------------------------------------------------

def hashed(*key):
    """A pseudo-random 63-bit number that depends on the key alone, on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def shuffled(index, n, key):
    """The index-th element of a pseudo-random permutation of range(n), without storing it.

    A four-round Feistel network permutes range(4**k), the smallest such range that contains
    range(n). A result of n or more is permuted again until it is below n (cycle walking: Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits of each half
    low = 2**half - 1
    while True:
        left = index >> half
        right = index & low
        for i in range(4):
            mixed = (((right + i + 1) * 0x9E3779B97F4A7C15) ^ key) * 0xBF58476D1CE4E5B9 % 2**64
            new_right = left ^ ((mixed >> 40) & low)
            left = right
            right = new_right
        index = left << half | right
        if index < n:
            return index


def train_batch(split, seed, first, count, block_size):
    """Inputs and targets of sequences first to first + count - 1, int64 (count, block_size) each.

    A pure function of its arguments. Each epoch cuts the split into blocks at its own offset, or at
    0 where sequences have a fixed length, and visits each block once in its own order.
    """
    n_blocks = max(1, (split.n_tokens - block_size) // block_size)
    # number of offsets at which n_blocks blocks still fit
    n_offsets = min(block_size, split.n_tokens - n_blocks * block_size)
    if split.sequence_length is not None:
        n_blocks, n_offsets = (split.n_tokens - 1) // block_size, 1
    starts = []
    for sequence in range(first, first + count):
        epoch, index = divmod(sequence, n_blocks)
        offset = hashed(seed, epoch, "offset") % n_offsets
        block = shuffled(index, n_blocks, hashed(seed, epoch, "order"))
        starts.append(offset + block * block_size)
    return split.inputs_and_targets(split.windows(starts, block_size + 1))


# -- validation windows ----------------------------------------------------------------------------

def val_windows(split, block_size, eval_tokens=None):
    """Start positions of the validation windows.

    They cover the split. With eval_tokens: as many as fit into it, at least one, evenly spaced.
    """
    n_windows = -(-(split.n_tokens - 1) // block_size)  # rounded up
    count = n_windows
    if eval_tokens is not None:
        count = min(n_windows, max(1, eval_tokens // block_size))
    return [i * n_windows // count * block_size for i in range(count)]


def val_batch(split, starts, rows, block_size):
    """Inputs and targets, int64 (rows, block_size) each, of the windows at starts.

    Where the split or starts end early, inputs are padded with 0 and targets with -1.
    """
    x = np.zeros((rows, block_size), dtype=np.int64)
    y = np.full((rows, block_size), -1, dtype=np.int64)
    for row, start in enumerate(starts):
        n = min(block_size, split.n_tokens - 1 - start)
        x[row, :n], y[row, :n] = split.inputs_and_targets(split.windows([start], n + 1))
    return x, y


def bits_per_byte(loss, split):
    """Nats per token -> bits per byte of the split's text, comparable between tokenizers."""
    return loss / math.log(2) * split.n_tokens / split.n_bytes
