"""Tokenizers, files, the order of training data and the validation windows."""

import errno
import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from test_inputs import fails, program

from nanogqa import dataloader, writer
from nanogqa.configurator import UserError
from nanogqa.dataloader import Dataset, shuffled, train_batch, val_batch, val_windows
from nanogqa.prompts import encode_prompts
from nanogqa.tokenizer import get_tokenizer, known_ids
from nanogqa.writer import write_dataset

ROOT = Path(__file__).resolve().parents[1]


def test_byte_tokenizer_is_one_id_per_byte():
    encoding = get_tokenizer("byte")
    text = "def f(x):\n\treturn 'é ∑ 🙂'\r\n\0"
    assert isinstance(encoding, tiktoken.Encoding) and encoding.n_vocab == 257
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    assert (
        encoding.encode("a<|endoftext|>b", allowed_special="all") == [97, 256, 98]
        and encoding.eot_token == 256
    )


def test_every_document_ends_with_end_of_text(tmp_path):
    write_dataset(
        [("train", "ab"), ("val", "x"), ("train", ""), ("train", "é")], tmp_path, "byte", note=1
    )
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [97, 98, 256, 256, 195, 169, 256]
    assert np.fromfile(tmp_path / "val.bin", "<u2").tolist() == [120, 256]
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    sums = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("train.bin", "val.bin")
    }
    assert meta["splits"]["train"] == [
        dict(name="train.bin", tokens=7, bytes=4, sha256=sums["train.bin"])
    ]
    lines = "".join(f"{sums[name]}  {name}\n" for name in sums)  # as sha256sum prints them
    assert meta["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"], meta["note"]) == (
        "byte",
        257,
        "uint16",
        1,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_large_vocabularies_are_written_as_uint32(tmp_path, monkeypatch):
    big = tiktoken.Encoding(
        "big",
        pat_str=r"(?s:.)",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 70000},
    )
    monkeypatch.setattr(writer, "get_tokenizer", lambda name: big)
    write_dataset([("train", "a"), ("val", "b")], tmp_path, "cl100k_base")
    data = Dataset(tmp_path)
    assert data.meta["dtype"] == "uint32" and data.train.windows([0], 2)[0].tolist() == [97, 70000]


def test_hash_tells_contents_apart(tmp_path):
    seen = set()
    for docs in (
        [("train", "ab"), ("val", "c")],
        [("train", "a"), ("val", "bc")],
        [("train", "a"), ("train", "b"), ("val", "c")],
    ):
        write_dataset(docs, tmp_path, "byte", overwrite=True)
        seen.add(Dataset(tmp_path).meta["sha256"])
    assert len(seen) == 3


def test_a_split_of_many_files_reads_as_one(tmp_path):
    tokens = np.arange(200, dtype="<u2")
    sizes = [50, 0, 3, 147]
    starts = np.cumsum([0] + sizes)
    files = []
    for i, n in enumerate(sizes):
        tokens[starts[i] : starts[i] + n].tofile(tmp_path / f"train_{i:05d}.bin")
        files.append(dict(name=f"train_{i:05d}.bin", tokens=n, bytes=n))
    (tmp_path / "val.bin").write_bytes(bytes(10))
    meta = dict(
        tokenizer="byte",
        vocab_size=257,
        dtype="uint16",
        sha256="0" * 64,
        splits=dict(train=files, val=[dict(name="val.bin", tokens=5, bytes=5)]),
    )
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    split = Dataset(tmp_path).train
    assert split.n_tokens == 200
    for start, count in ((0, 200), (0, 50), (49, 2), (48, 60), (52, 1), (53, 147), (199, 1)):
        assert split.windows([start], count)[0].tolist() == list(range(start, start + count))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_shuffled_is_a_permutation(n):
    orders = [[shuffled(i, n, key) for i in range(n)] for key in (1, 2**62 + 5)]
    for order in orders:
        assert sorted(order) == list(range(n))
    if n >= 63:
        assert orders[0] != orders[1]
        for order in orders:  # neighbours are as far apart as in a random order (n/3 on average)
            assert 0.2 < np.abs(np.diff(order)).mean() / n < 0.47


def test_shuffled_needs_no_storage():
    n = 5 * 10**12
    assert len({shuffled(i, n, 7) for i in range(1000)}) == 1000


@pytest.fixture
def counting(tmp_path):
    """A data set whose tokens are their own positions, modulo 256."""
    for split, n in (("train", 1003), ("val", 130)):
        (np.arange(n) % 256).astype("<u2").tofile(tmp_path / f"{split}.bin")
    splits = {
        split: [dict(name=f"{split}.bin", tokens=n, bytes=n)]
        for split, n in (("train", 1003), ("val", 130))
    }
    (tmp_path / "meta.json").write_text(
        json.dumps(dict(tokenizer="byte", vocab_size=257, dtype="uint16", sha256="0" * 64, splits=splits))
    )
    return Dataset(tmp_path)


def test_the_first_id_beyond_the_vocabulary_is_refused(counting, tmp_path, monkeypatch):
    """Where a split is opened, and in what is read of it later."""
    ids = np.fromfile(tmp_path / "train.bin", "<u2")
    ids[20] = 256
    ids.tofile(tmp_path / "train.bin")
    assert 256 in Dataset(tmp_path).train.windows([15], 10)
    ids[20] = 257
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="holds token id 257, but its vocabulary ends at 256"):
        Dataset(tmp_path)
    monkeypatch.setattr(dataloader, "SCANNED", 20)
    split = Dataset(tmp_path).train
    assert split.windows([5], 10).shape == (1, 10)
    with pytest.raises(UserError, match="holds token id 257"):
        split.windows([15], 10)


def test_an_epoch_visits_each_block_once(counting, monkeypatch):
    windows, read = [], counting.train.windows
    monkeypatch.setattr(
        counting.train,
        "windows",
        lambda starts, n: windows.extend((start, n) for start in starts) or read(starts, n),
    )
    T = 16
    n_blocks = (1003 - T) // T
    offsets = set()
    for epoch in range(4):
        windows.clear()
        for rank in range(2):  # two ranks take turns
            for first in range(epoch * n_blocks + rank, (epoch + 1) * n_blocks, 2):
                train_batch(counting.train, 1, first, 1, T)
        starts = sorted(start for start, _ in windows)
        assert starts == [starts[0] + i * T for i in range(n_blocks)] and 0 <= starts[0] < T
        assert {count for _, count in windows} == {T + 1} and starts[-1] + T + 1 <= 1003
        assert [s for s, _ in windows] != starts, "the order must be shuffled"
        offsets.add(starts[0])
    assert len(offsets) > 1, "each epoch starts at its own offset"


def test_every_seed_and_epoch_has_its_own_order(counting, monkeypatch):
    """Of blocks of 16 tokens, whatever the offset at which an epoch starts."""
    starts, read = [], counting.train.windows
    monkeypatch.setattr(
        counting.train, "windows", lambda some, n: starts.extend(some) or read(some, n)
    )
    n_blocks = (1003 - 16) // 16
    orders = set()
    for seed in (1, 2):
        for epoch in (0, 1):
            starts.clear()
            train_batch(counting.train, seed, epoch * n_blocks, n_blocks, 16)
            orders.add(tuple(int(start) // 16 for start in starts))
    assert len(orders) == 4


def test_a_batch_depends_on_seed_and_place_alone(counting):
    x, y = train_batch(counting.train, 3, 40, 8, 16)
    for i in range(8):
        xi, yi = train_batch(counting.train, 3, 40 + i, 1, 16)
        assert (xi == x[i]).all() and (yi == y[i]).all()
    assert ((x + 1) % 256 == y).all(), "a target is the token after its input"
    assert (x != train_batch(counting.train, 4, 40, 8, 16)[0]).any()


def test_a_split_just_longer_than_a_block_is_enough(counting):
    for T in (129, 100, 65):
        for sequence in range(30):
            x, y = train_batch(counting.val, 1, sequence, 1, T)
            assert x.shape == (1, T) and ((x + 1) % 256 == y).all()


def test_validation_covers_every_token_once(counting):
    starts = val_windows(counting.val, 16)
    targets = []
    for i in range(0, len(starts), 4):
        x, y = val_batch(counting.val, starts[i : i + 4], 4, 16)
        assert x.shape == y.shape == (4, 16)
        targets += [(int(a), int(b)) for a, b in zip(x.flatten(), y.flatten()) if b >= 0]
    assert targets == [(t, t + 1) for t in range(129)]
    some = val_windows(counting.val, 16, eval_tokens=50)
    assert some == [0, 48, 96] and val_windows(counting.val, 16, eval_tokens=10**9) == starts


def test_python_data_set_is_the_standard_library(tmp_path):
    """Sorted order, tests skipped, a declared encoding honoured, a tenth held out by hash."""
    tree = tmp_path / "lib"
    for i in range(20):
        (tree / f"pkg{i}").mkdir(parents=True)
        (tree / f"pkg{i}" / "mod.py").write_text(f"x = {i}\n")
    (tree / "test").mkdir()
    (tree / "test" / "test_x.py").write_text("no\n")
    (tree / "pkg0" / "latin.py").write_bytes(b"# coding: latin-1\ny = '\xe9'\n")
    out = tmp_path / "out"
    command = [
        sys.executable,
        ROOT / "data/python/prepare.py",
        f"--input={tree}",
        f"--data_dir={out}",
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    data = Dataset(out)
    encoding = get_tokenizer("byte")
    read = {
        split: encoding.decode(s.windows([0], s.n_tokens)[0].tolist()).split("<|endoftext|>")[:-1]
        for split, s in (("train", data.train), ("val", data.val))
    }
    assert len(read["train"]) == 19 and len(read["val"]) == 2
    assert (
        "# coding: latin-1\ny = 'é'\n" in read["train"] + read["val"]
        and "no\n" not in read["train"] + read["val"]
    )
    order = [f"x = {i}\n" for i in sorted(range(20), key=str)]
    assert [t for t in read["train"] if t in order] == [t for t in order if t in read["train"]]
    assert data.meta["sha256"][:16] in text and data.meta["python"] in text


def test_text_data_set_of_a_file_and_of_a_folder(tmp_path, capsys):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("prepare_text", ROOT / "data/text/prepare.py")
    prepare = module_from_spec(spec)
    sys.modules["prepare_text"] = prepare
    spec.loader.exec_module(prepare)
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    prepare.main([f"--input={tmp_path / 'a.txt'}", f"--data_dir={tmp_path / 'one'}"])
    one = Dataset(tmp_path / "one")
    assert (one.train.n_tokens, one.val.n_tokens) == (91, 11)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text {i}")
    (folder / "image.png").write_bytes(b"\x89\xff\xfe")
    prepare.main([f"--input={folder}", f"--data_dir={tmp_path / 'out'}"])
    assert "skipped because not UTF-8: 1 file (image.png)" in capsys.readouterr().out
    tokens = Dataset(tmp_path / "out").val.windows([0], Dataset(tmp_path / "out").val.n_tokens)[0]
    assert (tokens == 256).sum() in (2, 3)


def test_offline_without_the_tokenizer_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        get_tokenizer("r50k_base")
    with pytest.raises(UserError, match="choose one of byte, "):
        get_tokenizer("gpt7")


def test_a_data_set_checks_what_a_model_needs(counting):
    for vocab_size, block_size in ((257, 129), (300, 16)):
        counting.check_config(SimpleNamespace(vocab_size=vocab_size, block_size=block_size))
    with pytest.raises(UserError, match="has 257 token ids, more than vocab_size=256: raise"):
        counting.check_config(SimpleNamespace(vocab_size=256, block_size=16))
    with pytest.raises(UserError, match="needs 131 tokens in each split, .* has one of 130: lower"):
        counting.check_config(SimpleNamespace(vocab_size=257, block_size=130))


def test_a_failed_run_leaves_the_data_set_as_it_was(tmp_path):
    write_dataset([("train", "ab"), ("val", "x")], tmp_path, "byte")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def documents():
        yield "train", "other"
        raise UserError("stop")

    for given, words in ((documents(), "stop"), ([("train", "a")], "no text for the val split")):
        with pytest.raises(UserError, match=words):
            write_dataset(given, tmp_path, "byte")
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_full_disk_at_the_end_leaves_the_data_set_as_it_was(tmp_path, monkeypatch):
    """The last file to need room is meta.json. The old one was removed before."""
    write_dataset([("train", "ab"), ("val", "x")], tmp_path, "byte")
    before = stamps(tmp_path)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_dataset([("train", "other"), ("val", "y")], tmp_path, "byte", overwrite=True)
    assert before == stamps(tmp_path)


def test_files_of_another_program_are_not_replaced(tmp_path, capsys):
    """nanoGPT writes train.bin and val.bin too, with meta.pkl. They were replaced without a word."""
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    (tmp_path / "theirs").mkdir()
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / "theirs" / name).write_bytes(b"1234")
    before = stamps(tmp_path / "theirs")
    args = [f"--input={tmp_path / 'a.txt'}", f"--data_dir={tmp_path / 'theirs'}"]
    assert "theirs holds train.bin, but no meta.json: pass another --data_dir" in fails(program("text"), args, capsys)
    assert before == stamps(tmp_path / "theirs")
    program("text")([*args, "--overwrite=True"])
    assert Dataset(tmp_path / "theirs").train.n_tokens == 91


def test_a_data_set_whose_writer_was_killed_while_it_moved_files_is_written_again(tmp_path):
    """The files have their names, meta.json has not, and the part folder of the killed process is there."""
    documents = [("train", "abcd"), ("val", "x")]
    write_dataset(documents, tmp_path, "byte")
    before = {name: content for name, (content, _) in stamps(tmp_path).items()}
    (tmp_path / f".{socket.gethostname()}-999999999.part").mkdir()
    (tmp_path / "meta.json").unlink()
    write_dataset(documents, tmp_path, "byte")
    assert before == {name: content for name, (content, _) in stamps(tmp_path).items()}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, capsys, monkeypatch):
    """Its files were left out without a word, or it was an error of writing, whose remedy was another --data_dir."""
    (tmp_path / "in/b").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("0123456789" * 10)
    (tmp_path / "in/b/c.txt").write_text("0123456789" * 10)
    scandir, is_file = os.scandir, Path.is_file
    args = [f"--input={tmp_path / 'in'}", f"--data_dir={tmp_path / 'out'}"]

    def unlisted(path):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def unseen(path):
        if path.name == "c.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    for target, name, function, what in ((os, "scandir", unlisted, "in/b"), (Path, "is_file", unseen, "in/b/c.txt")):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, function)
            error = fails(program("text"), args, capsys)
        assert f"cannot read {tmp_path / what} (Permission denied): fix its permissions" in error
    program("text")(args)


@pytest.mark.parametrize("name", ["none", "tokenizer.json", "tokenizer.json 0123456789abcdef"])
def test_names_that_are_no_tokenizer(tmp_path, name):
    """The message spoke of a checkpoint, and there is none."""
    with pytest.raises(UserError, match="names no tokenizer: choose byte, a tiktoken encoding, or the folder of a"):
        write_dataset([("train", "a"), ("val", "b")], tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_one_writer_replaces_what_another_wrote(tmp_path):
    """A set of many files gives way to one of two, and nothing of it is left."""
    tokenizer = writer.open_tokenizer("byte")
    big = writer.DatasetWriter(tmp_path / "x.part", tokenizer, tokenizer.describe(), 3)
    for split, text in (("train", "abc"), ("val", "x"), ("train", "defg")):
        big.add(split, list(text.encode()), len(text))
    meta = big.finish()
    names = [file["name"] for file in meta["splits"]["train"]]
    assert names == ["train_00000.bin", "train_00001.bin"] and big.n_tokens == 11
    assert Dataset(tmp_path).train.n_tokens == 9
    write_dataset([("train", "ab"), ("val", "x")], tmp_path, "byte", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_file_of_another_data_set_is_not_taken_for_a_finished_one(tmp_path):
    """A writer that continues takes a file outside its folder only if the content is its own."""
    tokenizer = writer.open_tokenizer("byte")
    about = tokenizer.describe()
    first = writer.DatasetWriter(tmp_path / "x.part", tokenizer, about, 3)
    first.add("train", [97, 98, 99], 3)
    first.save({})
    (tmp_path / "x.part/train_00000.bin").rename(tmp_path / "train_00000.bin")
    progress = writer.find_unfinished(tmp_path / "x.part", about)
    assert writer.DatasetWriter(tmp_path / "x.part", tokenizer, about, 3, progress).n_tokens == 4
    np.array([1, 2, 3, 256], "<u2").tofile(tmp_path / "train_00000.bin")
    progress = writer.find_unfinished(tmp_path / "x.part", about)
    with pytest.raises(UserError, match="does not hold the files that its progress.json lists"):
        writer.DatasetWriter(tmp_path / "x.part", tokenizer, about, 3, progress)


# -- preparing again, and beside other things ------------------------------------------------------


def stamps(folder):
    """(content, time of change) of each file, by name."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found


def test_text_comes_from_a_pipe(tmp_path):
    """A pipe was taken for an empty folder."""
    (tmp_path / "a.txt").write_text("some text " * 100, encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("some text " * 100, encoding="utf-8"), daemon=True)
    writer.start()
    program("text")([f"--input={tmp_path / 'pipe'}", f"--data_dir={tmp_path / 'one'}"])
    program("text")([f"--input={tmp_path / 'a.txt'}", f"--data_dir={tmp_path / 'two'}"])
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_was_not_copied(tmp_path, missing):
    """The remedy was to download it again, or to name an eos_token in a file that was not there."""
    for name in {"tokenizer.json", "tokenizer_config.json"} - {missing}:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=f"has no {missing}: copy it from the folder of the run or data set"):
        get_tokenizer("tokenizer.json 0123", tmp_path)


@pytest.mark.parametrize("where", [".", "data", "data/.x.part/deep"])
def test_output_is_never_input(tmp_path, capsys, where):
    """--input and --data_dir are one folder: 90,006 bytes of text became 270,000 tokens."""
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / f"in/{i}.txt").write_text(f"some text {i}")
    if where != ".":
        (tmp_path / "in/tokenizer.json").write_text("not beside a data set, so it is input")
    args = [f"--input={tmp_path / 'in'}", "--overwrite=True"]
    program("text")([*args, f"--data_dir={tmp_path / 'alone'}"])
    want = Dataset(tmp_path / "alone").meta
    data_dir = tmp_path / "in" / where
    for _ in range(3):
        program("text")([*args, f"--data_dir={data_dir}"])
        assert Dataset(data_dir).meta["sha256"] == want["sha256"]
        for name in ("tokenizer.json", "tokenizer_config.json", "meta.json.part", ".lock"):
            (data_dir / name).write_text("what another run left")
        (data_dir / ".123.part").mkdir(exist_ok=True)
        (data_dir / ".123.part/train.bin").write_bytes(b"text")
    shutil.copytree(tmp_path / "alone", tmp_path / "in/other")
    (tmp_path / "in/other/meta.json").write_text("damaged")
    program("text")([*args, f"--data_dir={tmp_path / 'again'}"])
    assert Dataset(tmp_path / "again").meta["sha256"] == want["sha256"]
    assert "not UTF-8" not in capsys.readouterr().out


def test_the_same_data_again_changes_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.txt").write_text("9876543210" * 10)  # another text, and the same name
    args = [f"--data_dir={tmp_path / 'data'}"]
    program("text")([f"--input={tmp_path / 'a.txt'}", *args])
    before = stamps(tmp_path / "data")
    capsys.readouterr()
    program("text")([f"--input={tmp_path / 'a.txt'}", *args])
    out = capsys.readouterr().out
    assert "already holds this data set" in out and "91 tokens" in out
    assert before == stamps(tmp_path / "data")
    for change, words in (
        (f"--input={tmp_path / 'b/a.txt'}", "holds a data set with other content: pass another --data"),
        (f"--input={tmp_path / 'b'}", "holds a data set with other settings (source 'a.txt', not 'b'): pass another --data"),
    ):
        assert words in fails(program("text"), [change, *args], capsys)
        assert before == stamps(tmp_path / "data")
    program("text")([f"--input={tmp_path / 'b/a.txt'}", *args, "--overwrite=True"])
    assert before.keys() == stamps(tmp_path / "data").keys() and before != stamps(tmp_path / "data")


def test_a_damaged_data_set_is_written_again(tmp_path):
    """Damage inside the vocabulary shows in the sha256 alone."""
    documents = [("train", "abcd"), ("val", "x")]
    write_dataset(documents, tmp_path, "byte")
    before = {name: content for name, (content, _) in stamps(tmp_path).items()}
    for name, content in (("train.bin", b"a\0b\0c\0e\0\0\1"), ("val.bin", b""), ("val.bin", None)):
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        write_dataset(documents, tmp_path, "byte")
        assert before == {name: content for name, (content, _) in stamps(tmp_path).items()}


def test_a_data_set_of_an_older_version_is_recognized(tmp_path):
    """Its sha256 was made in another way, and its files had none."""
    documents = [("train", "abcd"), ("val", "x")]
    write_dataset(documents, tmp_path, "byte")
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    meta["sha256"] = "1" * 64
    del meta["splits"]["train"][0]["sha256"], meta["splits"]["val"][0]["sha256"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    before = stamps(tmp_path)
    write_dataset(documents, tmp_path, "byte")
    assert before == stamps(tmp_path)
    with pytest.raises(UserError, match="other content"):
        write_dataset([("train", "abce"), ("val", "x")], tmp_path, "byte")
    assert before == stamps(tmp_path)


def test_a_refused_run_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("new", "new/and/deep", "mine"):
        for tokenizer in ("byte", "nonsense"):
            with pytest.raises(UserError):
                write_dataset([("train", "text")], tmp_path / folder, tokenizer)
            assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


HANGS = """
import sys, time
from nanogqa.writer import write_dataset
def documents():
    yield "train", "text"
    print("on", flush=True)
    time.sleep(100)
write_dataset(documents(), sys.argv[1], "byte")
"""


def test_what_a_killed_run_left_is_removed(tmp_path):
    """Parts of dead processes go; those of running ones and of other machines stay."""
    running = []
    for _ in range(2):
        command = [sys.executable, "-c", HANGS, tmp_path]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "on\n"
    try:
        left = sorted(tmp_path.iterdir())
        assert len(left) == 2
        running[0].kill()
        running[0].wait(timeout=60)
        (tmp_path / f".elsewhere-{running[0].pid}.part").mkdir()
        (tmp_path / "mine.part").mkdir()
        write_dataset([("train", "text"), ("val", "more")], tmp_path, "byte")
        names = {path.name for path in tmp_path.iterdir()}
        assert {name for name in names if name.endswith(f"-{running[1].pid}.part")}
        assert len(names) == 6 and {"mine.part", f".elsewhere-{running[0].pid}.part"} <= names
    finally:
        for process in running:
            process.kill()
            process.wait(timeout=60)


def test_python_files_that_cannot_be_decoded_are_skipped(tmp_path, capsys):
    (tmp_path / "lib").mkdir()
    for i in range(20):
        (tmp_path / f"lib/good{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "lib/latin.py").write_bytes(b"# coding: latin-1\ny = '\xe9'\n")
    program("python")([f"--input={tmp_path / 'lib'}", f"--data_dir={tmp_path / 'good'}"])
    capsys.readouterr()
    odd = [
        "x = 1\n".encode("utf-16"), "x = 1\n".encode("utf-16-le"), b"\xff\xfe", b"x = '\xe9'\n",
        b"x = '\0'\n", b"\xef\xbb\xbf# coding: latin-1\n", b"# coding: utf-8\n\x80",
        b"# coding: unicode_escape\n\\ud800", b"# coding: utf-7\n+2AA-", b"# coding: idna\n\xff",
    ]  # fmt: skip
    for codec in ("nonsense", "rot13", "hex", "undefined", "utf-16", "zip", "mbcs", "\x7f", "a" * 9999):
        odd.append(f"# coding: {codec}\nx = 1\n".encode())
    for i, raw in enumerate(odd):
        (tmp_path / f"lib/odd{i}.py").write_bytes(raw)
    program("python")([f"--input={tmp_path / 'lib'}", f"--data_dir={tmp_path / 'odd'}"])
    out = capsys.readouterr().out
    counted = int(re.search(r"not Python source: (\d+) files", out)[1])
    assert counted >= len(odd) - 2, "a strange name of a codec may mean none"
    text = decoded(Dataset(tmp_path / "odd").train) + decoded(Dataset(tmp_path / "odd").val)
    assert all(document.isprintable() or "\n" in document for document in text)
    assert "y = 'é'\n" in "".join(text) and "\0" not in "".join(text)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("script,suffix", [("text", ".txt"), ("python", ".py")])
def test_file_names_that_are_not_text(tmp_path, script, suffix, encoding):
    """Names are bytes; those that are not UTF-8 reach Python with surrogates."""
    folder = os.fsencode(tmp_path) + b"/\xff\xc3\xa9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    for i in range(12):
        with open(folder + b"/\xfe%d" % i + suffix.encode(), "w") as file:
            file.write(f"x = {i}\n")
    for i in range(3):
        with open(folder + b"/\xfd%d" % i + suffix.encode(), "wb") as file:
            file.write(b"\xff\n")
    command = [sys.executable, f"data/{script}/prepare.py", b"--input=" + folder]
    environment = dict(os.environ, PYTHONIOENCODING=encoding)
    hashes = set()
    for data_dir in (b"/out", b"/out\xff"):
        done = subprocess.run(
            [*command, b"--data_dir=" + os.fsencode(tmp_path) + data_dir],
            cwd=ROOT, env=environment, capture_output=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"3 files (" in done.stdout
        hashes.add(Dataset(os.fsdecode(os.fsencode(tmp_path) + data_dir)).meta["sha256"])
    assert len(hashes) == 1


def file_with_truncation(folder, vocab_size=280):
    """Writes a tokenizer.json that stores truncation and padding. Returns its folder."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["some text to train on"], trainer)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=32, pad_token="<|endoftext|>")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return str(folder)


def decoded(split, encoding=None):
    """The documents of a split as text."""
    encoding = encoding or get_tokenizer("byte")
    documents = [b""]
    for token in split.windows([0], split.n_tokens)[0].tolist():
        if token == encoding.eot_token:
            documents.append(b"")
        else:
            documents[-1] += encoding.decode_single_token_bytes(token)
    assert documents.pop() == b""
    return [document.decode() for document in documents]


@pytest.mark.parametrize("name", ["byte", "gpt2", "tokenizer.json"])
def test_a_data_set_holds_every_byte_of_its_text(tmp_path, name):
    """A tokenizer.json that stores truncation gave 17 tokens of 15,631 bytes, and no word of it."""
    tokenizer = name
    if name == "tokenizer.json":
        tokenizer = file_with_truncation(tmp_path / "tokenizer")
    try:
        writer.open_tokenizer(tokenizer)
    except UserError as error:
        pytest.skip(str(error))
    long = "def f(x):\n\treturn 'é ∑ 🙂' <|endoftext|>\r\n\0 \u2028" * 300
    train = [long, "", "a", "some text", " ", "\n\n", long[:17]]
    documents = [("train", text) for text in train]
    write_dataset([*documents, ("val", long[5:]), ("val", "x")], tmp_path / "data", tokenizer)
    data = Dataset(tmp_path / "data")
    encoding = get_tokenizer(data.meta["tokenizer"], tmp_path / "data")
    assert decoded(data.train, encoding) == train
    assert decoded(data.val, encoding) == [long[5:], "x"]
    assert data.train.n_bytes == sum(len(text.encode()) for text in train)


class Server(http.server.BaseHTTPRequestHandler):
    """Sends server.head, and server.parts one after the other, with server.wait seconds between."""

    timeout = 60

    def do_GET(self):
        self.wfile.write(self.server.head + b"\r\n\r\n")
        for part in self.server.parts():
            try:
                self.wfile.write(part)
            except OSError:  # the client is gone
                return
            if self.server.over.wait(self.server.wait):
                return

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    server.over = threading.Event()
    server.wait = 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "head,wait,words",
    [
        ("HTTP/1.0 200 OK", 0, "another sha256"),
        ("HTTP/1.0 200 OK\r\nContent-Length: many", 0, "another sha256"),
        ("HTTP/1.0 200 OK\r\nContent-Length: 99999999999", 0, "another sha256"),
        ("HTTP/1.0 200 OK\r\nContent-Length: -1", 0, "another sha256"),
        ("HTTP/1.0 200 OK", 0.02, "not complete after 0.3 s"),
        ("nonsense", 0, "pass it as --input=FILE"),
        ("HTTP/1.0 404 Not Found", 0, "pass it as --input=FILE"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", 0, "pass it as --input=FILE"),
    ],
)
def test_a_download_of_anything_else(server, tmp_path, capsys, monkeypatch, head, wait, words):
    """An endless answer is read to the size of the text, and a slow one for a limited time."""
    main = program("shakespeare")
    module = sys.modules["prepare_shakespeare"]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{server.server_address[1]}/input.txt")
    monkeypatch.setattr(module, "PATIENCE", 0.3 if wait else 60)
    server.head = head.encode()
    server.wait = wait
    server.parts = lambda: itertools.repeat(b"text" * (10 if wait else 10**5))
    start = time.monotonic()
    assert words in fails(main, [f"--data_dir={tmp_path / 'data'}"], capsys)
    assert time.monotonic() - start < 10 and not (tmp_path / "data").exists()


@pytest.mark.parametrize("names", [
    (["train.bin", "train.bin"], ["val.bin"]), (["val.bin"], ["val.bin"]), (["train.bin"], ["train.bin"]),
    (["train_00001.bin"], ["val.bin"]), (["train_00000.bin", "train_00002.bin"], ["val.bin"]),
    (["../train.bin"], ["val.bin"]), (["meta.json"], ["val.bin"]), (["/x/train.bin"], ["val.bin"]),
    ([".lock"], ["val.bin"]), ([], ["val.bin"]), (["train.bin"], ["val.bin", "val_00001.bin"]),
])  # fmt: skip
def test_files_have_the_names_that_a_writer_gives(tmp_path, names):
    write_dataset([("train", "abc"), ("val", "abc")], tmp_path, "byte")
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    for split, wanted in zip(("train", "val"), names, strict=True):
        meta["splits"][split] = [dict(name=name, tokens=4, bytes=3) for name in wanted]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="meta.json is not the meta.json of a data set"):
        Dataset(tmp_path)


# -- ids that a tokenizer knows --------------------------------------------------------------------


def test_known_ids_are_those_that_have_bytes():
    encoding = get_tokenizer("byte")
    assert known_ids(encoding, 300).tolist() == [True] * 257 + [False] * 43
    assert known_ids(encoding, 3).tolist() == [True] * 3


def test_a_data_folder_on_another_disk(tmp_path):
    """Linked from the checkout, its scripts looked for the package beside it."""
    shutil.copytree(ROOT / "data/recall", tmp_path / "disk/data/recall", ignore=shutil.ignore_patterns("*.bin"))
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/nanogqa").symlink_to(ROOT / "nanogqa")
    (tmp_path / "checkout/data").symlink_to(tmp_path / "disk/data")
    subprocess.run([sys.executable, tmp_path / "checkout/data/recall/prepare.py", "--help"], check=True, capture_output=True)


def test_a_text_that_tiktoken_gives_up_on():
    """Its regular expressions panic on a million blanks in a row, and a panic is not an Exception."""
    class PanicException(BaseException):
        pass

    def panic(text, **options):
        raise PanicException("RuntimeError(StackOverflow)")
    encoding = SimpleNamespace(encode=panic, encode_ordinary=panic, eot_token=0)
    with pytest.raises(UserError, match="cannot read a text of 3 characters .RuntimeError.StackOverflow.*longest run of blanks"):
        list(writer.encode([("train", "abc")], encoding))
    with pytest.raises(UserError, match="cannot read a text of 5 characters"):
        encode_prompts(encoding, ["a" * 5], 10)

    def stopped(text, **options):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        encode_prompts(SimpleNamespace(encode=stopped, eot_token=0), ["a"], 10)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files")
def test_a_million_blanks(tmp_path, capsys):
    (tmp_path / "blanks.txt").write_text(" " * 1_500_000 + "a " * 200_000)
    args = [f"--input={tmp_path / 'blanks.txt'}", f"--data_dir={tmp_path / 'data'}", "--tokenizer=gpt2"]
    assert "longest run of blanks" in fails(program("text"), args, capsys) and not (tmp_path / "data").exists()
