"""Hostile settings: every setting of every program, with values that nobody would pass on purpose.

A program ends with 0, or with 2, one line and nothing changed on disk. What would only take long
is interrupted: it counts as accepted.
"""
import random
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from test_inputs import program

import bench
import compare
import convert
import sample
import train
from nanogqa import distributed
from nanogqa.writer import PrepareConfig

NUMBERS = ["-1", "0", "1", "2", "3", "7", "0.5", "-0.5", "1e-300", "5e-324", "1e308", "-1e308",
           "1e1000", "nan", "inf", "-inf", "2147483647", "4294967296", "9007199254740993",
           "9223372036854775807", "9223372036854775808", "-9223372036854775808", "1_0", "0x10",
           "1e3", "\u0663", "\u00bd", "9" * 400]
TEXTS = ["", " ", "None", "True", "auto", "x" * 5000, "a/b", "../x", "/dev/null/x", "x.pt", "x.bin",
         "\ud800", "a\nb", "\0", "\u202e", "{out_dir}", "%s", "(", "a{9}{9}", "[1]", "~", "--x",
         "\U0001f600", "data", "meta.json"]
VALUES = NUMBERS + TEXTS
ACCEPTED = (0, 130, 143)  # 130 and 143: interrupted by this test


class Interrupted:
    """Stands in for a function that a program calls again and again; stops it at the n-th call."""

    def __init__(self, function, n):
        self.function, self.n, self.calls = function, n, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls % self.n == 0:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


def tree(folder):
    """{path: content} of everything in folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def cases(settings_class, rng, times):
    """Each setting with random values, and then pairs of settings."""
    keys = [field.name for field in fields(settings_class)]
    for i in range(times):
        chosen = [keys[i % len(keys)]]
        if i >= times // 2:
            chosen.append(rng.choice(keys))
        yield [f"--{key}={rng.choice(VALUES)}" for key in chosen]


def attack(main, base, settings_class, times, capsys, folder):
    """Runs main with each case, after one without. Returns {exit code: how often}; each must be
    allowed."""
    codes, rng = {}, random.Random(times)
    for given in [[], *cases(settings_class, rng, times)]:
        before = tree(folder)
        capsys.readouterr()
        try:
            main([*base, *given])
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            raise AssertionError(given) from error
        error = capsys.readouterr().err
        codes[code] = codes.get(code, 0) + 1
        assert given or code in ACCEPTED, error
        diverged = code == 2 and "is not finite (lr " in error  # after step 0, which stays
        if code == 2:
            assert len(error.strip().splitlines()) == 1, (given, error)
        if code == 2 and not diverged:
            assert tree(folder) == before, (given, error, set(tree(folder)) ^ set(before))
        else:
            assert code in ACCEPTED or diverged, (given, code, error)
            for path in set(tree(folder)) - set(before):
                if path.is_file():
                    path.unlink()
            for path in sorted(set(tree(folder)) - set(before), reverse=True):
                path.rmdir()
            for path, content in before.items():
                if content is not None and (not path.exists() or path.read_bytes() != content):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
    return codes


@pytest.fixture
def here(tmp_path, monkeypatch, toy_data):
    """An empty working folder beside a data set."""
    shutil.copytree(toy_data, tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--device=cpu"]
RUN = [*SHAPE, "--block_size=16", "--dataset=toy", "--tokens_per_step=32", "--max_steps=2",
       "--eval_tokens=32", "--warmup_steps=1"]


def test_train(here, capsys, monkeypatch):
    monkeypatch.setattr(distributed.StopSignal, "agreed", Interrupted(lambda *args: 0, 4))
    codes = attack(train.main, [*RUN, "--out_dir=out"], train.TrainConfig, 700, capsys, here)
    assert codes[2] > 100, codes
    print(codes)


def test_resume(here, capsys, monkeypatch):
    train.main([*RUN, "--out_dir=out"])
    monkeypatch.setattr(distributed.StopSignal, "agreed", Interrupted(lambda *args: 0, 4))
    base = ["--out_dir=out", "--init_from=resume", "--device=cpu"]
    codes = attack(train.main, base, train.TrainConfig, 300, capsys, here)
    assert codes[2] > 100, codes
    print(codes)


def test_sample(here, capsys, monkeypatch):
    train.main([*RUN, "--out_dir=out"])
    monkeypatch.setattr(sample, "sample_token", Interrupted(sample.sample_token, 6))
    base = ["--out_dir=out", "--device=cpu", "--max_new_tokens=3"]
    codes = attack(sample.main, base, sample.SampleConfig, 300, capsys, here)
    assert codes[2] > 50, codes
    print(codes)


def test_bench(here, capsys, monkeypatch):
    monkeypatch.setattr(bench, "clock", Interrupted(bench.clock, 8))
    monkeypatch.setattr(bench, "bandwidth", lambda runtime: 1e10)
    for mode, short in (("decode", ["--prompt_len=4", "--new_tokens=2", "--repeats=1"]),
                        ("train", ["--block_size=16", "--steps=1"])):
        base = [*SHAPE, f"--mode={mode}", *short]
        codes = attack(bench.main, base, bench.BenchConfig, 150, capsys, here)
        assert codes[2] > 30, codes
        print(codes)


def test_compare(here, capsys, monkeypatch):
    monkeypatch.setattr(compare, "measure_speed", Interrupted(None, 1))
    base = [*RUN, "--out_dir=out"]
    codes = attack(compare.main, base, compare.CompareConfig, 250, capsys, here)
    assert codes[2] > 80, codes
    print(codes)


def test_convert(here, capsys):
    train.main([*RUN, "--out_dir=out"])
    for command, base in (("pool", ["--out_dir=out", "--new_dir=new", "--n_kv_head=1"]),):
        _, settings_class = convert.COMMANDS[command]
        codes = attack(lambda argv: convert.main([command, *argv]), base, settings_class, 150,
                       capsys, here)
        assert codes[2] > 30, codes
        print(codes)


def test_prepare(here, capsys):
    Path("text").mkdir()
    for name in ("a.txt", "b.txt"):
        Path("text", name).write_text(f"some text of {name}. " * 40)
    codes = attack(program("text"), ["--input=text", "--data_dir=set"], PrepareConfig, 150, capsys,
                   here)
    assert codes[2] > 30, codes
    print(codes)
