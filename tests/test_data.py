"""Tokenizers, files, the order of training data and the validation windows."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken

from nanogqa import writer
from nanogqa.configurator import UserError
from nanogqa.dataloader import Dataset, shuffled, train_batch, val_batch, val_windows
from nanogqa.tokenizer import Text, get_tokenizer, known_ids
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
    meta = json.loads((tmp_path / "meta.json").read_text())
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
    monkeypatch.setattr(writer, "get_tokenizer", lambda name, folder: big)
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
        for rank in range(2):  # two ranks take turns, three sequences each
            for first in range(epoch * n_blocks + rank, (epoch + 1) * n_blocks, 2):
                train_batch(counting.train, 1, first, 1, T)
        starts = sorted(start for start, _ in windows)
        assert starts == [starts[0] + i * T for i in range(n_blocks)] and 0 <= starts[0] < T
        assert {count for _, count in windows} == {T + 1} and starts[-1] + T + 1 <= 1003
        assert [s for s, _ in windows] != starts, "the order must be shuffled"
        offsets.add(starts[0])
    assert len(offsets) > 1, "each epoch starts at its own offset"


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
    assert "not UTF-8: 1 files (image.png" in capsys.readouterr().out
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
        counting.check(SimpleNamespace(vocab_size=vocab_size, block_size=block_size))
    with pytest.raises(UserError, match="has 257 token ids, more than vocab_size=256: raise"):
        counting.check(SimpleNamespace(vocab_size=256, block_size=16))
    with pytest.raises(UserError, match="needs 131 tokens in each split, .* has one of 130: lower"):
        counting.check(SimpleNamespace(vocab_size=257, block_size=130))


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


def test_one_writer_replaces_what_another_wrote(tmp_path):
    """A set of many files gives way to one of two, and nothing of it is left."""
    tokenizer = writer.open_tokenizer("byte", tmp_path)
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
    tokenizer = writer.open_tokenizer("byte", tmp_path)
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


def test_known_ids_are_those_that_have_bytes():
    encoding = get_tokenizer("byte")
    assert known_ids(encoding, 300).tolist() == [True] * 257 + [False] * 43
    assert known_ids(encoding, 3).tolist() == [True] * 3


def test_text_grows_by_whole_characters_up_to_the_stop_string():
    encoding = get_tokenizer("byte")
    for stop, raw, expected in (
        (None, b"ab\xf0\x9f\x99\x82c\xff", "ab🙂c\ufffd"),
        ("\n\n", b"a\nb\n\nc", "a\nb"),
        ("aab", b"aaab", "a"),
        ("xyz", b"xyxy", "xyxy"),
    ):
        text = Text(encoding, stop)
        shown = "".join(text.add(token) for token in raw)
        assert shown + text.finish() == expected and text.done and text.finish() == ""
