"""A thousand damaged checkpoints, .bin files, meta.json and configs: each is a sentence or a correct run."""
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, model_of
from test_inputs import trained  # noqa: F401

import sample
from nanogqa.configurator import UserError, build, parse
from nanogqa.dataloader import Dataset, train_batch, val_batch, val_windows
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = []
WATCHING = [False]


def watch(event, args):
    if WATCHING[0] and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        EXECUTED.append((event, args))


sys.addaudithook(watch)


@pytest.fixture(autouse=True)
def nothing_is_executed():
    """Fails a test during which Python starts a process or runs a shell: what a crafted file would want."""
    EXECUTED.clear()
    WATCHING[0] = True
    yield
    WATCHING[0] = False
    assert not EXECUTED


def mutated(data, rng, alphabet=range(256)):
    """data with one thing changed: bytes replaced, inserted, dropped, doubled, or the end cut off."""
    data, at = bytearray(data), rng.randrange(len(data))
    n = rng.choice([1, 1, 1, 2, 8, 64])
    kind = rng.choice(["replace", "insert", "drop", "double", "cut", "zero"])
    noise = bytes(rng.choice(alphabet) for _ in range(n))
    if kind == "replace":
        data[at:at + n] = noise
    elif kind == "insert":
        data[at:at] = noise
    elif kind == "drop":
        del data[at:at + n]
    elif kind == "double":
        data[at:at] = data[at:at + n]
    elif kind == "zero":
        data[at:at + n] = bytes(len(data[at:at + n]))
    else:
        del data[at:]
    return bytes(data)


def outcomes(times, attempt):
    """How often attempt(rng) came to a UserError and how often it ran; each must have happened."""
    count = {"error": 0, "run": 0}
    for i in range(times):
        try:
            attempt(random.Random(i))
            count["run"] += 1
        except UserError as error:
            count["error"] += 1
            assert str(error) and "\n" not in str(error), str(error)
    assert count["error"] and count["run"], count
    return count


def test_the_watch_sees_what_is_executed():
    os.system("true")
    assert EXECUTED.pop()[0] == "os.system" and not EXECUTED


@pytest.mark.filterwarnings("ignore")
def test_checkpoints(trained, tmp_path):  # noqa: F811
    """Half of the damage goes to the archive's directory and the pickle in it, where it does most."""
    good, path = (trained / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    start = good.find(b"PK\x01\x02")  # the archive's directory
    weights = load(trained)["model"]

    def attempt(rng):
        low, high = rng.choice([(0, 6000), (start, len(good)), (0, len(good)), (0, len(good))])
        path.write_bytes(good[:low] + mutated(good[low:high], rng) + good[high:])
        state = load(tmp_path)
        model = model_of(state)
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items()), "other weights, and no word of it"
    print(outcomes(400, attempt))


def test_checkpoints_through_sample(trained, tmp_path, capsys):  # noqa: F811
    good, args = (trained / "ckpt.pt").read_bytes(), ["--max_new_tokens=2", "--device=cpu"]
    sample.main([f"--out_dir={trained}", *args])
    text = capsys.readouterr().out
    count = {"error": 0, "run": 0}
    for i in range(20):
        (tmp_path / "ckpt.pt").write_bytes(mutated(good, random.Random(1000 + i)))
        try:
            sample.main([f"--out_dir={tmp_path}", *args])
            assert capsys.readouterr().out == text
            count["run"] += 1
        except SystemExit as exit:
            assert exit.code == 2 and "Traceback" not in capsys.readouterr().err
            count["error"] += 1
    assert count["error"], count


@pytest.mark.parametrize("name,times", [("meta.json", 250), ("train.bin", 100)])
def test_data_sets(toy_data, tmp_path, name, times):
    folder = tmp_path / "data"
    shutil.copytree(toy_data, folder)
    good = (folder / name).read_bytes()

    def attempt(rng):
        (folder / name).write_bytes(mutated(good, rng, b'0123456789{}[]",:.-truefalsn \n' if name == "meta.json" else range(256)))
        data = Dataset(str(folder))
        for x, y in (train_batch(data.train, 1, rng.randrange(10**6), 4, 32), val_batch(data.val, val_windows(data.val, 32)[:4], 4, 32)):
            assert x.shape == y.shape == (4, 32) and x.dtype == np.int64 and 0 <= x.min() and max(x.max(), y.max()) < data.train.vocab_size
    outcomes(times, attempt)


def test_configs(tmp_path):
    good = b'"""doc"""\nn_layer = 2\nn_head = 4\nn_kv_head = 2  # shared\nlearning_rate = 3e-4 * 2\nout_dir = "{out_dir}/x"\nqk_norm = True\n'
    path = tmp_path / "config.py"

    def attempt(rng):
        path.write_bytes(mutated(good, rng, bytes(range(32, 127)) + b"\n\xff"))
        config = build(TrainConfig, parse(TrainConfig, [str(path)], ""))
        assert config.n_head % config.n_kv_head == 0 and math.isfinite(config.learning_rate)
    count = outcomes(230, attempt)
    assert count["run"]


def test_programs_end_with_2_and_without_a_traceback():
    for command in (["train.py", "--n_kv_head=3"], ["sample.py", "--out_dir=/no/run"], ["bench.py", "--batch_size=0"], ["compare.py", "--seeds=0"],
                    ["convert.py", "pool", "--out_dir=/no/run"], ["data/text/prepare.py"]):
        WATCHING[0] = False
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(command[0].split("/")[-1]), done.stderr
