"""Tokenized text: tokenizers, the writer behind every data/*/prepare.py, and the reader behind training.

A data set is a folder of .bin files (raw uint16 or uint32 token ids, one after another) and one meta.json, which lists
the files of each split with their token and byte counts. Every document ends with the end-of-text token.
"""
import bisect
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import UserError

DATA = Path(__file__).resolve().parent / "data"
EOT = "<|endoftext|>"
SCANNED = 2**24  # tokens at the start of a split that are checked when it is opened; the rest is checked as it is read


# -- tokenizers --------------------------------------------------------------------------------------------------------

HF_TOKENIZER = "tokenizer.json"
# byte-level tokenizer.json files write a byte as a visible character, as GPT-2's does: itself, or one from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNICODE_OF_BYTE = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(VISIBLE)))}


def get_tokenizer(name, folder="."):
    """The tokenizer of that name: "byte", one id per byte, 0 to 255, and end-of-text as 256; a tiktoken.Encoding; or the
    tokenizer.json in folder, whose name holds its hash."""
    if name == "byte":
        return tiktoken.Encoding("byte", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={EOT: 256})
    if name == "none":
        raise UserError("this checkpoint came without a tokenizer: train it on a data set, whose tokenizer it takes over")
    if name.startswith(HF_TOKENIZER):
        tokenizer = HuggingFaceTokenizer(folder)
        if tokenizer.name != name:
            raise UserError(f"{folder}/{HF_TOKENIZER} is not the one that belongs here (another sha256): restore it from a copy")
        return tokenizer
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError:  # of which a failed download is one
        raise UserError(f"the files of tokenizer {name!r} are not on this machine and cannot be downloaded: set "
                        "TIKTOKEN_CACHE_DIR to a folder that holds them, or use --tokenizer=byte") from None
    except ValueError:
        names = ", ".join(["byte", *tiktoken.list_encoding_names()])
        raise UserError(f"there is no tokenizer {name!r}: choose one of {names}, or a folder with a {HF_TOKENIZER}") from None
    if EOT not in encoding.special_tokens_set:
        raise UserError(f"tokenizer {name!r} has no {EOT} token to end a document with: choose another")
    return encoding


class HuggingFaceTokenizer:
    """A tokenizer.json, with what this project uses of tiktoken.Encoding. tokenizer_config.json beside it names eos_token."""

    def __init__(self, folder):
        path, about = Path(folder) / HF_TOKENIZER, Path(folder) / "tokenizer_config.json"
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs tokenizers: pip install transformers safetensors") from None
        try:
            content = path.read_bytes()
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
            special = json.loads(about.read_text()) if about.exists() else {}
            names = [special.get(key) or "" for key in ("eos_token", "bos_token")]
            eos, bos = (self.tokenizer.token_to_id(x["content"] if isinstance(x, dict) else x) for x in names)
            self.byte_level = "ByteLevel" in json.dumps(json.loads(self.tokenizer.to_str())["decoder"])
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{path} cannot be read ({str(error)[:100]}): fetch it again") from None
        if eos is None:
            raise UserError(f"{about} names no eos_token that ends a document: add it")
        self.name = f"{HF_TOKENIZER} {hashlib.sha256(content).hexdigest()[:16]}"
        self.eot_token, self.bos_token = eos, eos if bos is None else bos
        self.added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.n_vocab = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.byte = {char: byte for byte, char in UNICODE_OF_BYTE.items()}

    def encode(self, text, allowed_special="all"):
        """Ids of text, with the beginning that the model expects (a BOS token, for Llama)."""
        self.tokenizer.encode_special_tokens = not allowed_special
        return self.tokenizer.encode(text).ids

    def encode_ordinary(self, text):
        return self.encode(text, allowed_special=())

    def encode_ordinary_batch(self, texts):
        """Ids of each text, on all cores, or as many as the environment's RAYON_NUM_THREADS says."""
        self.tokenizer.encode_special_tokens = True
        return [encoded.ids for encoded in self.tokenizer.encode_batch(texts)]

    def decode_single_token_bytes(self, token):
        """The bytes of one id, which may be a part of a character. KeyError where there is no such id."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if token in self.added:
            return self.added[token].encode()
        if self.byte_level:
            return bytes(self.byte[char] for char in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece: bytes by name, and spaces as lower blocks
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def copy_tokenizer(name, source, target):
    """Lets a tokenizer.json travel along: from the folder source into target."""
    for file in (HF_TOKENIZER, "tokenizer_config.json") if name.startswith(HF_TOKENIZER) else ():
        if (Path(source) / file).exists() and not (Path(target) / file).exists():
            shutil.copyfile(Path(source) / file, Path(target) / file)


# -- writing -----------------------------------------------------------------------------------------------------------

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


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def write_json(path, content):
    """Replaces path as a whole, and on the disk."""
    with open(f"{path}.part", "w") as file:
        json.dump(content, file, indent=1)
        sync(file)
    os.replace(f"{path}.part", path)


# -- reading -----------------------------------------------------------------------------------------------------------

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
