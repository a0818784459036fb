"""compare.py and nanogqa/report.py: what is held equal, what resumes, what the report says."""
import contextlib
import copy
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import kept_in_memory, load
from test_inputs import fails
from tqdm import tqdm

import bench
import compare
import train
from compare import CompareConfig, Timing, matching_n_ff, plan, run_bench
from nanogqa import distributed, files, runs as training
from nanogqa.configurator import UserError, build, parse
from nanogqa.dataloader import Dataset
from nanogqa.estimates import (
    Difference,
    Estimate,
    detectable,
    estimate_differences,
    holm,
    p_value,
    paired,
    power,
    rank_test,
    smallest_p,
    steps_to,
    student_t,
)
from nanogqa.log import read_rows
from nanogqa.pictures import Point, apart, bandwidth_beyond_cache, colors_of, draw_fronts, front, paired_curves
from nanogqa.published import PUBLISHED, relative_differences
from nanogqa.report import report, table
from nanogqa.results import load_results
from nanogqa.summary import summarize
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
TOY = ["--device=cpu", "--n_layer=1", "--n_head=4", "--n_embd=32", "--block_size=32",
       "--tokens_per_step=128", "--max_steps=12", "--eval_interval=4", "--eval_tokens=512",
       "--warmup_steps=2", "--decode_batch_size=1,2", "--decode_prompt_len=8"]


def planned(toy_data, *args):
    argv = [f"--dataset={toy_data}", *TOY, *args]
    return plan(parse(compare.CompareConfig, argv, "", axes=True))


def names_of(toy_data, *args):
    """The names of the variants of one matching."""
    return [v.name for v in planned(toy_data, "--match=shape", *args)[2]]


def rows_of(folder):
    return read_rows(folder / "metrics.jsonl")


def state_of(folder):
    """{name: (content, time of the last change)} of the files in a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def bench_here(timing):
    """run_bench in this process, which has loaded torch already."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bench.main(compare.bench_command(timing)[2:])
    result = json.loads(out.getvalue().splitlines()[-1])
    return result.get("rows", [result])


def train_here(run, bar):
    """run_training in this process."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(word) for word in training.train_command(run)[2:]])


class Stop(Exception):
    """Ends a comparison in the middle."""


def stop(*args):
    raise Stop


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products of these sizes are no faster with two threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def comparison(toy_data, tmp_path_factory):
    """A comparison, killed after its first run and then resumed.

    (folder, arguments, files of the first run before the second call, its output)
    """
    folder = tmp_path_factory.mktemp("compare")
    args = [f"--dataset={toy_data}", f"--out_dir={folder}", *TOY, "--n_kv_head=4,1", "--seeds=2",
            "--match=params"]
    with pytest.MonkeyPatch.context() as patch:  # the timings, and nothing more
        patch.setattr(compare, "run_bench", bench_here)
        patch.setattr(bench, "bandwidth", kept_in_memory(bench.bandwidth))
        patch.setattr(compare, "train_runs", stop)
        with pytest.raises(Stop):
            compare.main(args)

    process = subprocess.Popen(
        [sys.executable, ROOT / "compare.py", *args], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        first = folder / "runs" / "MHA-n_ff96-seed1337"
        deadline = time.time() + 200
        while True:
            rows = rows_of(first)
            if rows and rows[-1]["step"] >= 12 and len(list(folder.glob("runs/*"))) >= 2:
                break
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with its training
        process.wait()
    before = state_of(first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_training", train_here)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            compare.main(args)
    return folder, args, before, out.getvalue()


@pytest.fixture
def again(comparison, tmp_path, monkeypatch):
    """(folder, arguments) of a copy of the comparison, whose runs train in this process."""
    folder = tmp_path / "again"
    shutil.copytree(comparison[0], folder)
    monkeypatch.setattr(training, "run_training", train_here)
    return folder, [*comparison[1], f"--out_dir={folder}"]


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def contents(folder):
    """{path: content} of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- a comparison and its report -------------------------------------------------------------------

def test_a_killed_comparison_resumes_without_repeating_finished_runs(comparison):
    folder, _, before, out = comparison
    assert state_of(folder / "runs" / "MHA-n_ff96-seed1337") == before
    assert re.search(r"^4 runs of 12 steps, 1 of them finished", out, re.M)
    records = json.loads((folder / "results.json").read_text(encoding="utf-8"))["records"]
    assert [(r["variant"], r["seed"]) for r in records] == [
        ("MHA", 1337), ("MHA", 1338), ("MQA", 1337), ("MQA", 1338)]
    for record in records:
        assert [step for step, _ in record["curve"]] == [0, 4, 8, 12]
        assert record["curve"][-1][1] == record["val_loss"]
        rows = rows_of(folder / "runs" / record["run"])
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        assert rows[-1]["val_loss"] == record["val_loss"]
    assert records[0]["curve"] != records[1]["curve"], "another seed is another run"


def test_the_report_shows_the_numbers_of_results_json(comparison):
    folder, args, *_ = comparison
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    text = (folder / "report.md").read_text(encoding="utf-8")
    records = results["records"]
    losses = {"MHA": [], "MQA": []}
    for record in records:
        losses[record["variant"]].append(record["val_loss"])
    for name, (a, b) in losses.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        record = next(r for r in records if r["variant"] == name)
        assert f"{(a + b) / 2:.4f} ± {abs(a - b) / 2:.4f}" in line
        assert f"{record['params']:,} (" in line
        assert f"| {record['kv_bytes_per_token']:,} |" in line and f"| {record['n_ff']} |" in line
    (a, b), (c, d) = losses["MHA"], losses["MQA"]
    difference = (c + d - a - b) / 2
    half = 12.7062 * abs((c - a) - (d - b)) / 2
    shown = re.search(
        r"\| ([+-]\d+\.\d{4}) ± (\d+\.\d{4}) \| ± (\d+\.\d{4}) \| (\S+) \| ([^|]*) \|", text)
    assert float(shown[1]) == pytest.approx(difference, abs=6e-5)
    assert float(shown[2]) == pytest.approx(half, abs=1e-4) and shown[3] == shown[2]
    p = 1 - 2 / math.pi * math.atan(abs(difference) / half * 12.7062)  # of one comparison
    assert float(shown[4]) == pytest.approx(p, abs=6e-4)
    assert shown[5] == ("not distinguishable" if p > 0.05 else "worse" if difference > 0 else
                        "better")
    assert "- MQA: n_head 4, n_kv_head 1\n" in text
    speed = results["speed"][records[0]["shape"]]
    assert [cell["batch_size"] for cell in speed["decode"]] == [1, 2]
    assert f"| {speed['decode'][1]['step_ms']:.2f} |" in text
    mha, mqa = records[0]["kv_bytes_per_token"], records[2]["kv_bytes_per_token"]
    assert mha == 4 * mqa == 2 * 32 * 4
    (folder / "report.md").unlink()
    compare.main([*args, "--report_only=True"])
    assert (folder / "report.md").read_text(encoding="utf-8") == text


def test_records_and_report_have_every_metric(comparison):
    folder, *_ = comparison
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for record in results["records"]:
        expected = {key: record[key] for key in ("val_loss", "val_bpb")}
        assert record["metrics"] == expected
    row = {"step": 1, "val_loss": 2.0, "val_accuracy": 0.5, "val_missing": None, "lr": 1e-3}
    assert compare.metrics_of(row) == {"val_loss": 2.0, "val_accuracy": 0.5}

    plain = report(results, [])
    older = copy.deepcopy(results)
    for record in older["records"]:
        del record["metrics"]
    assert report(older, []) == plain, "results.json had no metrics before"

    for accuracy, record in zip((0.25, 0.35, 0.5, 0.5), results["records"], strict=True):
        record["metrics"]["val_token_accuracy"] = accuracy
    text = report(results, [])
    assert "| bits per byte | token accuracy |\n" in text
    mha, mqa = (line for line in text.splitlines() if re.match(r"\| M[HQ]A \| \d+ \|", line))
    assert "| 0.3000 ± 0.0500 |" in mha and "| 0.5000 ± 0.0000 |" in mqa
    del results["records"][2]["metrics"]["val_token_accuracy"]
    assert "0.5000 ± 0.0000" not in report(results, []), "a metric that one seed lacks has no mean"
    assert [list(s.metrics) for s in summarize(results)] == [["val_token_accuracy"], []]


def test_results_of_other_settings_are_refused(comparison, capsys):
    folder, args, *_ = comparison
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for change, words in (("--max_steps=13", "max_steps 12 there, 13 here"),
                          ("--n_kv_head=4,2", "other variants; they can only be added, after the first"),
                          ("--n_kv_head=2,1", "n_kv_head of the first variant is 2, not 4; name of the first variant is GQA-2, not MHA"),
                          ("--seeds=1", "seeds 2 there, 1 here (they can only be raised)"),
                          ("--learning_rate=1e-3", "learning_rate 0.003 there")):
        with pytest.raises(SystemExit) as exit:
            compare.main([*args, change])
        error = capsys.readouterr().err.strip()
        assert exit.value.code == 2 and words in error and "\n" not in error
        assert "--overwrite=True" in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_higher_seeds_adds_runs(again, monkeypatch, capsys):
    """It was refused: a comparison could not gain power without starting again."""
    folder, args = again
    monkeypatch.setattr(compare, "measure_speed", stop)  # what is timed stays
    before = {run.name: state_of(run) for run in (folder / "runs").iterdir()}
    old = results_of(folder)
    compare.main([*args, "--seeds=3"])
    assert "6 runs of 12 steps, 4 of them finished" in capsys.readouterr().out
    for name, state in before.items():
        assert state_of(folder / "runs" / name) == state
    results = load_results(folder / "results.json", CompareConfig)
    assert results["settings"] == dict(old["settings"], seeds=3)
    assert results["speed"] == old["speed"]
    assert [(r["variant"], r["seed"]) for r in results["records"]] == [
        (name, seed) for name in ("MHA", "MQA") for seed in (1337, 1338, 1339)]
    for record in old["records"]:
        assert record in results["records"]
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Comparison of 2 variants, 3 seeds\n")
    with pytest.raises(SystemExit) as exit:  # and it cannot be lowered again
        compare.main(args)
    assert exit.value.code == 2 and "seeds 3 there, 2 here" in capsys.readouterr().err


def test_further_variants_are_added(again, comparison, monkeypatch, capsys):
    """One's own design could not be set beside those of a finished comparison without training them again. Timings are made
    anew, all on one machine and day."""
    folder, args = again
    old = results_of(folder)
    monkeypatch.setattr(compare, "run_bench", lambda timing: [dict(row) for row in old["speed"]["MHA-n_ff96"][timing.mode]])
    path = folder / "results.json"
    path.write_text(json.dumps(old | {"machine": old["machine"] | {"cpu": "another"}, "date": "2020-01-01"}), encoding="utf-8")
    compare.main([*args, "--n_kv_head=2,1,4"])  # the order was taken for a difference: the first was another one
    assert "6 runs of 12 steps, 4 of them finished" in capsys.readouterr().out
    new = load_results(path, CompareConfig)
    assert [(r["variant"], r["seed"]) for r in new["records"]] == [
        (name, seed) for name in ("MHA", "GQA-2", "MQA") for seed in (1337, 1338)]
    assert all(record in new["records"] for record in old["records"])
    assert new["machine"] == old["machine"] and new["date"] > "2020-01-01" and len(new["speed"]) == 3


def test_a_comparison_has_one_dtype(again, capsys):
    """With dtype=auto, seeds that were added on a GPU were in bfloat16, and the sizes of all caches halved."""
    folder, args = again
    path = folder / "results.json"
    results = results_of(folder)
    results["machine"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(results), encoding="utf-8")
    for more in ([], ["--dtype=float32"]):
        with pytest.raises(SystemExit):
            compare.main([*args, "--seeds=3", *more])
        assert "holds runs in bfloat16, and further ones would be in float32: add --dtype=bfloat16" in capsys.readouterr().err
    results["machine"]["dtype"] = "float32"
    path.write_text(json.dumps(results), encoding="utf-8")
    compare.main([*args, "--dtype=float32"])


def test_changed_code_is_said(again, monkeypatch, capsys):
    """After a correction of model.py the same command reported the runs of before, without a word."""
    folder, args = again
    compare.main(args)
    assert "has changed" not in capsys.readouterr().err
    for name in (*compare.CODE, "README.md"):
        (folder.parent / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder.parent / "tree" / name)
    monkeypatch.setattr(compare, "__file__", str(folder.parent / "tree/compare.py"))
    before = compare.code_digest()
    for name in compare.CODE:
        content = (folder.parent / "tree" / name).read_bytes()
        (folder.parent / "tree" / name).write_bytes(content + b"#")
        assert compare.code_digest() != before
        (folder.parent / "tree" / name).write_bytes(content)
    assert compare.code_digest() == before
    (folder.parent / "tree/model.py").write_bytes(b"changed")
    compare.main(args)
    assert "warning: one of model.py, train.py," in capsys.readouterr().err


def test_what_becomes_an_axis_by_itself(toy_data):
    """A single n_kv_head was ignored, and half of an odd n_head was an error about a value that nobody gave."""
    assert names_of(toy_data, "--n_head=8", "--n_kv_head=2") == ["MHA", "GQA-2", "MQA"]
    assert names_of(toy_data, "--n_head=8", "--n_kv_head=1") == ["MHA", "MQA"]
    assert names_of(toy_data, "--n_head=9", "--n_embd=36") == ["MHA", "GQA-3", "MQA"]
    assert names_of(toy_data, "--n_head=1") == ["MHA"]


def test_a_kind_of_attention_of_ones_own_has_its_name():
    """It was called MHA, and then refused as a second model of that name."""
    assert compare.attention_kind(SimpleNamespace(attention="mine", n_head=4, n_kv_head=4)) == "MINE"


def test_the_better_of_two_rounds():
    """The time of a prompt was that of the round with the faster step."""
    rows = [[dict(step_ms=step, prefill_s=prefill)] for step, prefill in ((2.0, 7.0), (1.0, 9.0))]
    assert compare.faster_rows(*rows) == [dict(step_ms=1.0, prefill_s=7.0)]
    assert compare.faster_rows([dict(step_ms=1.0)], [dict(step_ms=2.0)]) == [dict(step_ms=1.0)]


def test_everything_is_timed_in_two_rounds(monkeypatch):
    calls = []
    timings = [Timing("a", "train", {}), Timing("b", "decode", {}), Timing("c", "train", {})]
    monkeypatch.setattr(compare, "plan_timings", lambda *args: timings)

    def run_bench(timing):
        calls.append(timing.key)
        return [dict(step_ms=float(9 - len(calls)))]
    monkeypatch.setattr(compare, "run_bench", run_bench)
    speed = compare.measure_speed([], None, {})
    assert calls == ["a", "b", "a", "b"] and speed["a"]["train"] == [dict(step_ms=6.0)]
    assert speed["c"] == speed["a"] != speed["b"]  # bench.py would do the same for c as for a


def test_steps_are_timed_with_all_their_micro_steps(toy_data):
    """An update was timed after each micro-step, although a run has one after all of them."""
    argv = [f"--dataset={toy_data}", *TOY, "--batch_size=1,4", "--match=shape"]
    given = parse(compare.CompareConfig, argv, "", axes=True)
    config, _, variants = plan(given)
    training = [timing.settings for timing in compare.plan_timings(variants, config, given) if timing.mode == "train"]
    assert [(s["batch_size"], s["micro_steps"], s["steps"]) for s in training] == [(1, 4, 7), (4, 1, 30)]
    assert variants[0].config.log_interval == 1
    given = parse(compare.CompareConfig, [*argv, "--log_interval=3"], "", axes=True)
    assert plan(given)[2][0].config.log_interval == 3, "it was accepted and had no effect"


def test_long_names_stand_below_the_pictures(comparison):
    """Beside their points, they left the panel."""
    matplotlib = pytest.importorskip("matplotlib")
    results = results_of(comparison[0])
    for long in ("", " learning_rate=0.01"):
        for record in results["records"]:
            record["variant"] = record["variant"].split()[0] + long
        summaries = summarize(results)
        figure = draw_fronts(summaries, colors_of(matplotlib, summaries), results)
        assert len(figure.legends) == len(long[:1]) and len(figure.axes[0].texts) == (0 if long else 2)


def test_other_learning_rates_are_not_timed_again(toy_data):
    argv = [f"--dataset={toy_data}", *TOY, "--learning_rate=1e-3,1e-2", "--optimizer=adamw,muon", "--match=shape"]
    given = parse(compare.CompareConfig, argv, "", axes=True)
    config, _, variants = plan(given)
    timings = compare.plan_timings(variants, config, given)
    assert len(variants) == 4 and len(timings) == 8
    assert [timings.index(timing) for timing in timings] == [0, 1, 2, 1, 0, 1, 2, 1]  # AdamW, decoding, Muon


def test_a_run_that_cannot_end(toy_data, tmp_path, monkeypatch):
    """Running the same command again was the only remedy for a learning rate at which the loss is not finite."""
    variant = planned(toy_data, "--match=shape")[2][0]
    monkeypatch.setattr(training, "train_command", lambda run: [sys.executable, "-c", "raise SystemExit(2)"])
    with pytest.raises(UserError, match="or choose another --out_dir to leave this variant out"):
        training.run_training(training.Run(variant.config, variant.key, 1, tmp_path / "run"), tqdm(disable=True))


def test_the_error_of_a_run_under_torchrun_is_its_own(toy_data, tmp_path, monkeypatch):
    """It was the last line, and torchrun ends its report with a line of equal signs."""
    variant = planned(toy_data, "--match=shape")[2][0]
    lines = "print('train.py: the loss is not finite: lower it'); print('Traceback'); print('====='); raise SystemExit(2)"
    monkeypatch.setattr(training, "train_command", lambda run: [sys.executable, "-c", lines])
    with pytest.raises(UserError, match=re.escape("code 2 (train.py: the loss is not finite: lower it)")):
        training.run_training(training.Run(variant.config, variant.key, 1, tmp_path / "run"), tqdm(disable=True))


def test_a_run_that_is_damaged_when_it_ends(toy_data, tmp_path, monkeypatch):
    """It "ended at step 0", and the same command trained it again, forever."""
    config, _, variants = planned(toy_data, "--match=shape")
    run = training.Run(variants[0].config, variants[0].key, 1, tmp_path / "run")

    def look(dataset, curves, GPTConfig):
        run.damage = "its metrics.jsonl holds impossible values"
    run.look = look
    monkeypatch.setattr(training, "run_training", lambda run, bar: None)
    speed = {variant.key: dict(train=[dict(tok_s=1.0)]) for variant in variants}
    results = dict(speed=speed, records=[])
    with pytest.raises(UserError, match="ended, but its metrics.jsonl holds impossible values"):
        training.train_runs([run], config, results, compare.Dataset(toy_data), compare.GPTConfig)


def test_runs_in_a_linked_folder_are_removed(tmp_path):
    """Of a comparison that is replaced. Where they stayed, they were resumed."""
    (tmp_path / "disk/MHA-seed1").mkdir(parents=True)
    (tmp_path / "disk/MHA-seed1/ckpt.pt").touch()
    (tmp_path / "disk/notes.txt").touch()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    compare.remove_runs(tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes.txt"]
    compare.remove_runs(tmp_path / "none")


def test_runs_use_all_gpus(toy_data, tmp_path, monkeypatch):
    """By torchrun with a rank for each. The settings of the command are those of the variant."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    variant = planned(toy_data, "--match=shape")[2][1]
    for device, ranks in (("auto", 4), ("cuda", 4), ("cpu", 1), ("cuda:0", 1)):
        config = replace(variant.config, device=device)
        run = training.Run(config, variant.key, 7, tmp_path / "run")
        words = [str(word) for word in training.train_command(run)]
        assert ("--nproc_per_node=4" in words, training.ranks_of(config)) == (ranks > 1, ranks)
        at = words.index(str(ROOT / "train.py"))
        built = build(TrainConfig, parse(TrainConfig, words[at + 1:], ""))
        assert built == replace(config, seed=7, out_dir=str(tmp_path / "run"), init_from="auto")


def test_the_time_that_is_left(toy_data, tmp_path, monkeypatch):
    """Two runs of 12 steps of 128 tokens, one of them half done, with evaluations at 0, 4, 8 and 12, of 512 tokens each."""
    variant = planned(toy_data, "--match=shape")[2][0]
    half, new = (training.Run(variant.config, "shape", seed, tmp_path, steps) for seed, steps in ((1, 6), (2, 0)))
    left = 1.5 * (12 * 128 + 4 * 512 / 3) / 1000
    for gpus, device in ((0, "cpu"), (4, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        config = replace(variant.config, device=device)
        seconds = training.remaining_seconds([half, new], config, {"shape": {"train": [{"tok_s": 1000}]}}, Dataset(toy_data))
        assert seconds == pytest.approx(left / max(1, gpus))


def test_a_comparison_on_another_version_of_torch(again, monkeypatch, capsys):
    folder, args = again
    monkeypatch.setattr(torch, "__version__", "9.0")
    compare.main(args)
    assert "further ones have 9.0: differences may come from that" in capsys.readouterr().err


def test_compare_starts_torchrun_itself(again, monkeypatch, capsys):
    """Both ranks trained the same runs."""
    monkeypatch.setattr(compare, "world", lambda: distributed.World(0, 2, 0))
    assert "start it without torchrun" in fails(compare.main, again[1], capsys)


def test_an_unfinished_comparison_has_no_report(again, capsys):
    folder, args = again
    for missing in (dict(records=[]), dict(speed={})):
        (folder / "results.json").write_text(json.dumps(results_of(folder) | missing), encoding="utf-8")
        assert "belongs to an unfinished comparison" in fails(compare.main, [f"--out_dir={folder}", "--report_only=True"], capsys)


def test_published_differences_stand_beside_kinds_of_attention(comparison):
    """A learning rate, a design or MHA itself was compared with those of GQA, MQA and MLA."""
    results = results_of(comparison[0])
    assert "published differences at least as large" in report(results, [])
    for name in ("MHA learning_rate=0.003", "tied", ""):
        other = json.loads(json.dumps(results).replace('"MQA', f'"{name}'))
        text = report(other, [])
        assert "published" not in text and "found with 80 % power" in text


def test_added_runs_that_were_interrupted(again, monkeypatch, capsys):
    """Until all of them are finished, results.json and the report are those of fewer seeds, and
    the number of seeds is still free."""
    folder, args = again
    kept = [(folder / name).read_bytes() for name in ("results.json", "report.md")]
    seen = []

    def stop_at_last(run, bar):
        if len(seen) == 3:
            raise Stop
        seen.append(run.folder.name)
        train_here(run, bar)
    monkeypatch.setattr(training, "run_training", stop_at_last)
    with pytest.raises(Stop):
        compare.main([*args, "--seeds=4"])
    assert seen == ["MHA-n_ff96-seed1339", "MQA-n_ff112-seed1339", "MHA-n_ff96-seed1340"]
    assert [(folder / name).read_bytes() for name in ("results.json", "report.md")] == kept
    compare.main(args)
    compare.main([*args, "--seeds=3"])
    assert "6 runs of 12 steps, 6 of them finished" in capsys.readouterr().out
    assert len(results_of(folder)["records"]) == 6 and len(seen) == 3


def test_results_without_newer_settings_are_resumed(comparison, capsys):
    folder, args, *_ = comparison
    path = folder / "results.json"
    text = path.read_text(encoding="utf-8")
    old = json.loads(text)
    for values in (old["settings"], *old["variants"]):
        for key in ("attention", "kv_lora_rank", "rope_head_dim"):
            del values[key]
    path.write_text(json.dumps(old), encoding="utf-8")
    compare.main(args)
    assert "4 of them finished" in capsys.readouterr().out
    path.write_text(text, encoding="utf-8")


def test_two_runs_of_one_variant_and_seed_give_one_curve(toy_data, tmp_path, comparison):
    variant = planned(toy_data, "--n_kv_head=4,1", "--seeds=2", "--match=params")[2][1]
    training.run_training(training.Run(variant.config, variant.key, 1337, tmp_path / "again"), tqdm(disable=True))

    def curve(folder):
        keys = ("step", "train_loss", "val_loss", "grad_norm")
        return [[row[key] for key in keys] for row in rows_of(folder)]
    assert curve(tmp_path / "again") == curve(comparison[0] / "runs" / variant.run_name(1337))


def test_a_timing_is_a_process_of_bench(monkeypatch):
    settings = {"device": "cpu", "n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16,
                "batch_size": 2, "block_size": 8, "steps": 1}
    (row,) = run_bench(Timing("toy", "train", settings))
    assert row["batch_size"] == 2 and row["step_ms"] > 0
    done = subprocess.CompletedProcess([], 2, "", "a warning\nbench.py: no memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(UserError, match=r"bench.py --mode=train failed for toy \(bench.py: no memory\): its settings are those"):
        run_bench(Timing("toy", "train", settings))
    with pytest.raises(UserError, match="its batch_size and prompt_len are decode_batch_size and decode_prompt_len"):
        run_bench(Timing("toy", "decode", settings))


def test_what_is_timed_are_the_settings_of_each_variant(toy_data):
    """The first variant's batch_size, and the fast modules, were timed for all."""
    argv = [f"--dataset={toy_data}", *TOY, "--batch_size=1,2", "--fast=True,False", "--match=shape"]
    given = parse(compare.CompareConfig, argv, "", axes=True)
    config, _, variants = plan(given)
    found = []
    for timing in compare.plan_timings(variants, config, given):
        if timing.mode == "train":
            assert timing.settings["fast"] == ("fast=True" in timing.key)
            found.append((timing.settings["batch_size"], timing.settings["fast"]))
        elif timing.mode == "decode":
            assert timing.settings["batch_size"] == [1, 2]
    assert found == [(1, True), (1, False), (2, True), (2, False)]


# -- what is read back -----------------------------------------------------------------------------

def cut(rows, count):
    return "".join(json.dumps(row) + "\n" for row in rows[:count])


def other_loss(rows, step, metric="val_loss"):
    """The text of rows where the loss, or another metric, at that step is another one."""
    rows = copy.deepcopy(rows)
    for row in rows:
        if row["step"] == step:
            row[metric] += 0.25
    return cut(rows, None)


DAMAGES = {
    "cut at step 8": lambda rows: cut(rows, 9),
    "the last row cut short": lambda rows: cut(rows, None)[:-9],
    "a list": lambda rows: "[]\n",
    "a dict": lambda rows: "{}",
    "empty": lambda rows: "",
    "another loss at the end": lambda rows: other_loss(rows, 12),
    "an evaluation twice": lambda rows: cut(rows, 5) + cut(rows, None),
    "an impossible loss": lambda rows: cut(rows, None).replace(
        f'"val_loss": {rows[4]["val_loss"]}', '"val_loss": 1e300'),
}


@pytest.mark.parametrize("names", [list(DAMAGES)[:4], list(DAMAGES)[4:]], ids=str)
def test_a_run_with_a_damaged_log_starts_again(again, comparison, capsys, names):
    """A log cut at step 300 of 400 gave the loss of step 300; most others were tracebacks."""
    folder, args = again
    runs = sorted((folder / "runs").iterdir())
    for run, name in zip(runs, names, strict=True):
        text = DAMAGES[name](rows_of(run))
        assert text != (run / "metrics.jsonl").read_text(encoding="utf-8"), name
        (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    compare.main(args)
    out = capsys.readouterr().out
    assert out.count(" starts again: its metrics.jsonl") == 4 and ", 0 of them finished" in out
    for record, expected in zip(results_of(folder)["records"], results_of(comparison[0])["records"],
                                strict=True):
        assert record["curve"] == expected["curve"]
        assert record["metrics"] == expected["metrics"]


def test_an_empty_list_in_a_config_file(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("n_kv_head = []\n", encoding="utf-8")
    for main in (compare.main, bench.main):
        assert "n_kv_head must be a literal" in fails(main, [str(tmp_path / "empty.py")], capsys)


def test_a_checkpoint_of_a_later_step_starts_again():
    """Of a step of 10^12, all evaluations up to it were listed first."""
    config = compare.CompareConfig(max_steps=10, eval_interval=5)
    words = "its checkpoint is of a later step"
    assert training.damage_of([], dict(step=10**12, val_loss=None), config) == words


def test_a_run_counts_as_finished_by_its_checkpoint(again, comparison, capsys):
    """Its log alone does not say that: the checkpoint may be missing, damaged or an older one."""
    folder, args = again
    (folder / "results.json").write_text(json.dumps(dict(results_of(folder), records=[])), encoding="utf-8")
    missing, damaged, older, _ = sorted((folder / "runs").iterdir())
    (missing / "ckpt.pt").unlink()
    content = (damaged / "ckpt.pt").read_bytes()
    (damaged / "ckpt.pt").write_bytes(content[:len(content) // 2])
    state = load(older)
    for moments in state["optimizer"]["state"].values():
        moments["step"].fill_(8)
    torch.save(dict(state, step=8, val_loss=rows_of(older)[8]["val_loss"]), older / "ckpt.pt")
    compare.main(args)
    out = capsys.readouterr().out
    assert out.count(f"{damaged.name} starts again: its checkpoint is damaged") == 1
    assert ", 1 of them finished" in out
    for record, expected in zip(results_of(folder)["records"], results_of(comparison[0])["records"],
                                strict=True):
        same = 3 if record["run"] == older.name else 4
        assert record["curve"][:same] == expected["curve"][:same] and len(record["curve"]) == 4


def test_a_checkpoint_that_cannot_be_read_is_not_replaced(again, monkeypatch, capsys):
    """A finished run was trained again, as if damaged, where its checkpoint was of a newer version, or the disk failed."""
    folder, args = again
    newer = sorted((folder / "runs").iterdir())[0]
    state = load(newer)
    torch.save(dict(state, config=state["config"] | {"new_setting": 1}), newer / "ckpt.pt")
    assert "has the setting new_setting, which this version does not know" in fails(compare.main, args, capsys)
    torch.save(dict(state, config=state["config"] | {"n_layer": 1025}), newer / "ckpt.pt")
    assert "has settings that no model can have" in fails(compare.main, args, capsys)
    torch.save(state, newer / "ckpt.pt")

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(torch, "load", fail)
    assert "cannot read" in fails(compare.main, args, capsys)


def test_recorded_runs_need_no_checkpoint(again, monkeypatch, capsys):
    """So that checkpoints can be deleted, and a comparison can go on from its records and logs alone. A log that differs from
    its record counts for nothing."""
    folder, args = again
    old = results_of(folder)["records"]
    for run in (folder / "runs").iterdir():
        (run / "ckpt.pt").unlink()
    trained = []
    monkeypatch.setattr(training, "run_training", lambda run, bar: (trained.append(run.folder.name), train_here(run, bar)))
    compare.main([*args, "--seeds=3"])
    assert trained == ["MHA-n_ff96-seed1339", "MQA-n_ff112-seed1339"]
    assert "6 runs of 12 steps, 4 of them finished" in capsys.readouterr().out
    assert all(record in results_of(folder)["records"] for record in old)
    mha, mqa = folder / "runs/MHA-n_ff96-seed1337", folder / "runs/MQA-n_ff112-seed1338"
    for changed, metric in ((mha, "val_bpb"), (mqa, "val_loss")):
        (changed / "metrics.jsonl").write_text(other_loss(rows_of(changed), 12, metric), encoding="utf-8")
    compare.main([*args, "--seeds=3"])
    assert trained[2:] == [mha.name, mqa.name]
    new = [record for record in results_of(folder)["records"] if record["seed"] < 1339]
    assert new == old


def test_a_run_of_another_variant_is_refused(again, capsys):
    folder, args = again
    mha, _, mqa, _ = sorted((folder / "runs").iterdir())
    for name in ("ckpt.pt", "metrics.jsonl"):
        shutil.copy(mha / name, mqa / name)
    before = contents(folder)
    with pytest.raises(SystemExit) as exit:
        compare.main(args)
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and error.endswith(
        f"{mqa} holds another run: move it away, and run the same command again")
    assert contents(folder) == before


BAD = [None, True, -1, 0, 2**62, 10**400, 0.5, 1e308, math.nan, math.inf, "", "x", "\ud800", "a\0b",
       [], {}, [[]], {"a": {}}]


def places(value, at=()):
    """The keys that lead to every value inside value."""
    inside = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, inner in inside:
        yield (*at, key)
        yield from places(inner, (*at, key))


def mutations(value, count):
    """Copies of a JSON value, each damaged at one random place."""
    rng = random.Random(0)
    everywhere = list(places(value))
    for _ in range(count):
        changed = copy.deepcopy(value)
        *way, key = rng.choice(everywhere)
        parent = changed
        for step in way:
            parent = parent[step]
        match rng.randrange(8):
            case 0:
                del parent[key]
            case 1:
                parent[key] = [parent[key]]
            case 2:
                parent[key] = str(parent[key])
            case 3 if isinstance(parent, list):
                parent.append(parent[key])
            case 4:
                for _ in range(rng.choice((20, 700))):
                    parent[key] = [parent[key]]
            case _:
                parent[key] = rng.choice(BAD)
        yield changed


def damaged_texts(text, count):
    """Copies of a text with an end cut off or a character replaced."""
    rng = random.Random(1)
    for _ in range(count):
        at = rng.randrange(len(text))
        tail = rng.choice(("", rng.choice('[]{}",:0x\0\u2028') + text[at + 1:]))
        yield text[:at] + tail


@pytest.fixture
def quick(again, comparison, monkeypatch):
    """again, where nothing is planned, timed, trained or saved as a picture a second time."""
    folder, args = again
    original = comparison[0]
    speed = results_of(original)["speed"]

    def restore(run, bar):
        shutil.rmtree(run.folder)
        shutil.copytree(original / "runs" / run.folder.name, run.folder)
    monkeypatch.setattr(training, "run_training", restore)
    monkeypatch.setattr(compare, "measure_speed", lambda *args: copy.deepcopy(speed))
    monkeypatch.setattr(compare, "plan", kept_in_memory(plan))
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    return folder, args


def answer(args, folder, capsys):
    """Runs a comparison: True, or False after one sentence that has changed nothing."""
    before = contents(folder)
    try:
        compare.main(args)
        capsys.readouterr()
        return True
    except SystemExit as exit:
        error = capsys.readouterr().err.strip()
        if error.startswith("warning: one of model.py"):  # code_digest of the damaged file
            error = error.partition("\n")[2]
        assert exit.code == 2 and error and "\n" not in error, error
        assert contents(folder) == before
        return False


def test_damaged_results_are_a_sentence_or_change_nothing(quick, comparison, capsys):
    """4 of 60 such changes were tracebacks."""
    folder, args = quick
    path = folder / "results.json"
    good = path.read_text(encoding="utf-8")
    expected = results_of(folder)["records"]
    texts = [json.dumps(changed) for changed in mutations(json.loads(good), 160)]
    texts += damaged_texts(good, 40)
    refused = 0
    for i, text in enumerate(texts):
        path.write_text(text, encoding="utf-8")
        if answer([*args, f"--report_only={i % 2 == 0}"], folder, capsys):
            if i % 2:
                assert losses_of(results_of(folder)["records"]) == losses_of(expected)
        else:
            refused += 1
    assert refused > 100, "most changes are noticed"


def losses_of(records):
    return [(x["match"], x["variant"], x["seed"], x["val_loss"], x["curve"]) for x in records]


def test_damaged_logs_never_change_a_result(quick, monkeypatch, capsys):
    folder, args = quick
    monkeypatch.setattr(compare, "write_report", lambda *args: None)
    run = sorted((folder / "runs").iterdir())[2]
    path = run / "metrics.jsonl"
    good = path.read_text(encoding="utf-8")
    expected = losses_of(results_of(folder)["records"])
    texts = [cut(rows, None) for rows in mutations(rows_of(run), 60)]
    texts += damaged_texts(good, 20)
    restored = 0
    for text in texts:
        path.write_text(text, encoding="utf-8")
        assert answer(args, folder, capsys)
        assert losses_of(results_of(folder)["records"]) == expected
        restored += path.read_text(encoding="utf-8") == good != text
    assert restored > 20


def test_the_files_are_utf8_on_a_terminal_that_knows_ascii_alone(comparison, tmp_path):
    folder = tmp_path / "Größe"
    folder.mkdir()
    shutil.copy(comparison[0] / "results.json", folder)
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0",
             "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, ROOT / "compare.py", "--report_only=True",
                           f"--out_dir={folder}"], env={**os.environ, **plain},
                          capture_output=True, timeout=200)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text == (comparison[0] / "report.md").read_text(encoding="utf-8") and " ± " in text


def test_committed_results_match_the_schema():
    paths = [*ROOT.glob("results/**/results.json"), *ROOT.glob("results/ablation/*.json")]
    assert len(paths) > 15
    for path in paths:
        assert load_results(path, CompareConfig)["records"], path


# -- the plan --------------------------------------------------------------------------------------

@pytest.mark.parametrize("args", [
    [],
    ["--qk_norm=False", "--tie_embeddings=False"],
    ["--n_embd=96", "--n_head=12", "--n_kv_head=12,4,2,1"],
    ["--controls=True"],
    ["--n_layer=3", "--head_dim=16", "--qkv_bias=True"],
], ids=str)
def test_matched_parameters_agree(toy_data, args):
    _, _, variants = planned(toy_data, *args)
    shape = [v for v in variants if v.match == "shape"]
    params = [v for v in variants if v.match == "params"]
    first = variants[0].facts["params"]
    assert variants[0].name == "MHA" and [v.name for v in shape] == [v.name for v in params]
    for v in params:
        assert abs(v.facts["params"] / first - 1) < 0.005
    assert len({v.config.n_ff for v in shape}) == 1 and shape[-1].facts["params"] < 0.98 * first


def test_rounding_keeps_half_a_percent(toy_data):
    config = planned(toy_data, "--n_kv_head=4,1")[2][0].config
    each = 3 * 1 * 32
    # 117 -> 120, 288 parameters of 102,016
    assert matching_n_ff(config, 100_000, 100_000 + 21 * each) == 96 + 24
    # the multiple of 8 would be 3 % off
    assert matching_n_ff(config, 10_000, 10_000 + 20 * each) == 96 + 20
    with pytest.raises(UserError, match="within 0.5 % of the 7,000 of the first variant: choose --match=shape"):
        matching_n_ff(config, 7000 - 45, 7000)  # half of what one more unit adds


def test_designs_are_the_models_of_config(toy_data, capsys):
    """config/cache.py lists them; each has the settings of its file, and what all runs share."""
    given = parse(CompareConfig, [*TOY, f"--dataset={toy_data}", str(ROOT / "config/cache.py"), "--n_layer=4"], "", axes=True)
    config, _, variants = compare.plan(given)
    assert config.seeds == 6 and config.match == "params"
    assert [v.name for v in variants] == given["design"] and len(variants) == 9
    by_name = {v.name: v for v in variants}
    assert by_name["gemma_like"].config.window == 64 and by_name["gemma_like"].config.kv_share == 2
    assert by_name["mla"].config.attention == "mla" and by_name["mla"].config.n_kv_head == 4
    first = variants[0].facts
    for v in variants:
        assert (v.config.n_layer, v.config.n_embd) == (4, 32) and abs(v.facts["params"] / first["params"] - 1) < 0.005
    caches = {v.name: v.facts["kv_bytes_of_context"] / first["kv_bytes_of_context"] for v in variants}
    assert caches["gqa"] == caches["tied"] == caches["share"] == 1 / 2 and caches["mqa"] == 1 / 4
    assert caches["window"] == (3 * 64 + 4096) / (4 * 4096)
    assert caches["gemma_like"] == (2 * 64 + 4096) / (4 * 4 * 4096)
    assert caches["deepseek_v4_like"] == (3 * 64 + 4096) / (8 * 4 * 4096)
    assert names_of(toy_data, "--design=mha,mqa", "--learning_rate=1e-3,3e-3")[1] == "mha learning_rate=0.003"
    assert names_of(toy_data, "--design=window", "--n_layer=4") == ["window"]
    assert names_of(toy_data, "--design=gqa,window", "--n_layer=4", "--controls=True") == ["gqa", "2 heads gqa", "heads of 4 gqa", "window"]


@pytest.mark.parametrize("design,words", [
    ("gpt2_124m", "sets dataset, but a design is a model alone"), ("recall", "sets dataset, but a design"),
    ("none", "there is no design none: name a file of"), ("../config/gqa", "there is no design ../config/gqa"),
    ("window --window=16,32", "window is given, but belongs to a design such as window: leave window out"),
    ("mla --attention=gqa", "attention is given"), ("window --n_kv_head=4,1", "n_kv_head is given")])
def test_what_is_no_design_is_refused(toy_data, design, words):
    """A flag would be overridden by the design, or two models would have one name."""
    with pytest.raises(UserError) as error:
        planned(toy_data, *f"--design=tied,{design}".split())
    assert words in str(error.value)


@pytest.mark.parametrize("args,words", [
    ("--n_ff=32,64", "with equal params, n_ff=32 and n_ff=64 are the same model"), ("--head_dim=8,None --match=shape", "are the same model")])
def test_one_model_under_two_names_is_refused(toy_data, args, words):
    """It was trained twice, and the comparison of it with itself made the others less precise."""
    with pytest.raises(UserError, match=words):
        planned(toy_data, *args.split())
    planned(toy_data, "--n_ff=32,64", "--match=shape")


@pytest.mark.parametrize("line", ["block_size = 16", "vocab_size = 300"])
def test_a_design_sets_nothing_that_all_runs_share(toy_data, tmp_path, monkeypatch, line):
    """Variants with another block_size train on other sequences."""
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config/mha.py", tmp_path / "config/mha.py")
    (tmp_path / "config/other.py").write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "compare.py"))
    with pytest.raises(UserError, match=f"sets {line.split()[0]}, but a design is a model alone, without what all runs share"):
        planned(toy_data, "--design=mha,other")


def test_models_whose_folders_would_be_one_are_refused(toy_data):
    """Both runs went to one folder, and one of them was reported as both."""
    with pytest.raises(UserError, match="names that differ in punctuation alone"):
        planned(toy_data, "--n_kv_head=1", "--trainable=attn.*,attn.+")


def test_controls_have_the_cache_of_what_they_control_for(toy_data):
    variants = planned(toy_data, "--controls=True", "--match=shape")[2]
    assert [v.name for v in variants] == [
        "MHA", "GQA-2", "2 heads", "heads of 4", "MQA", "1 head", "heads of 2"]
    cache = {v.name: v.facts["kv_bytes_per_token"] for v in variants}
    assert cache["GQA-2"] == cache["2 heads"] == cache["heads of 4"] == cache["MHA"] // 2
    assert cache["MQA"] == cache["1 head"] == cache["heads of 2"] == cache["MHA"] // 4
    names = [v.name for v in planned(toy_data, *"--n_head=4,8 --n_kv_head=4 --head_dim=8 --controls=True --match=shape".split())[2]]
    assert names == ["n_head=4", "n_head=8", "heads of 4 n_head=8"], "4 heads n_head=8 is the model n_head=4"
    names = [v.name for v in planned(toy_data, "--controls=True", "--match=shape", "--rope_fraction=0.4")[2]]
    assert names == ["MHA", "GQA-2", "2 heads", "heads of 4", "MQA", "1 head"], "heads of 2 have no pair to rotate"


def test_any_list_is_an_axis(toy_data):
    assert names_of(toy_data, "--qk_norm=True,False", "--learning_rate=1e-3,3e-3") == [
        "qk_norm=True learning_rate=0.001", "qk_norm=True learning_rate=0.003",
        "qk_norm=False learning_rate=0.001", "qk_norm=False learning_rate=0.003"]
    assert names_of(toy_data, "--n_head=1,2,4,8") == [f"n_head={n}" for n in (1, 2, 4, 8)]
    assert names_of(toy_data, "--n_kv_head=1,4", "--qk_norm=True,False") == [
        "MHA qk_norm=True", "MHA qk_norm=False", "MQA qk_norm=True", "MQA qk_norm=False"]


@pytest.mark.parametrize("args,names", [
    # a setting of one kind of attention is shown where it is off its default
    (["--attention=gqa,mla", "--qkv_bias=True", "--n_kv_head=4,1"],
     ["MHA qkv_bias=True", "MQA qkv_bias=True", "MLA"]),
    (["--attention=gqa,mla", "--qkv_bias=False,True", "--n_kv_head=4"],
     ["MHA qkv_bias=False", "MHA qkv_bias=True", "MLA"]),
    # what all variants share is not
    (["--qkv_bias=True", "--qk_norm=False", "--n_kv_head=4,1"], ["MHA", "MQA"]),
    (["--attention=gqa,mla", "--dropout=0.1", "--n_kv_head=2"], ["GQA-2", "MLA"]),
    # the name of a control says what it changes
    (["--attention=gqa,mla", "--qkv_bias=True", "--n_kv_head=2", "--controls=True"],
     ["GQA-2 qkv_bias=True", "2 heads qkv_bias=True", "heads of 8 qkv_bias=True", "MLA"]),
    (["--n_head=8", "--n_kv_head=8,4", "--controls=True"],
     ["MHA", "GQA-4", "4 heads", "heads of 4"]),
    # one model given twice is one variant
    (["--n_kv_head=4,None,1"], ["MHA", "MQA"]),
], ids=str)
def test_names_tell_variants_apart(toy_data, args, names):
    assert names_of(toy_data, "--n_embd=64", *args) == names


# -- statistics ------------------------------------------------------------------------------------

def test_quantiles_of_t():
    for df, value in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216),
                      (30, 2.04227)):  # any table of t
        assert student_t(df) == pytest.approx(value, rel=1e-5)
    # scipy 1.17: stats.t.ppf(1 - 0.025 / count, df), for intervals that hold together
    for df, count, value in ((3, 3, 4.856657), (3, 5, 5.840909), (15, 3, 2.693739),
                             (15, 5, 2.946713), (23, 5, 2.807336)):
        assert student_t(df, 1 - 0.025 / count) == pytest.approx(value, rel=1e-6)


def test_p_values():
    # scipy 1.17: 2 * stats.t.sf(t, df)
    for t, df, value in ((1.0, 1, 0.5), (3.95, 3, 0.0289444140), (2.5, 15, 0.0245058032),
                         (0.5, 23, 0.6218252753), (6.0, 4, 0.00388253705)):
        assert p_value(Estimate(-2 * t, 2.0), df) == pytest.approx(value, rel=1e-8)
    assert p_value(Estimate(0.1, 0.0), 3) == 0.0 and p_value(Estimate(0.0, 0.0), 3) == 1.0


def test_holm():
    # by hand, from the smallest: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04 raised to 0.06
    adjusted = holm({"H1": 0.01, "H2": 0.04, "H3": 0.03, "H4": 0.005})
    assert adjusted == pytest.approx({"H1": 0.03, "H2": 0.06, "H3": 0.06, "H4": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
    assert holm({"a": 0.03}) == {"a": 0.03}


def test_detectable_differences():
    # scipy 1.17: stats.nct.sf(threshold, df, noncentrality)
    for noncentrality, df, threshold, value in (
            (15, 1, 12.7, 0.7609871987), (4.2, 3, 3.18, 0.7911330883), (7, 3, 5.84, 0.7520798002),
            (4, 15, 2.947, 0.8345231659), (2.8, 99, 1.98, 0.7930290141)):
        assert power(noncentrality, df, threshold) == pytest.approx(value, abs=1e-9)
    # the noncentrality at which stats.nct.sf is 0.8
    for df, count, value in ((1, 1, 16.334009), (3, 1, 4.255899), (3, 5, 7.440484),
                             (15, 1, 2.997866), (15, 5, 3.850819), (23, 3, 3.453679)):
        assert detectable(df, 0.05 / count) == pytest.approx(value, rel=1e-5)
    # pairs that a t test needs for effects of 1, 0.8 and 0.5 deviations: the first number at which
    # stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, effect * sqrt(n)) is at least 0.8
    for effect, pairs in ((1.0, 10), (0.8, 15), (0.5, 34)):
        assert detectable(pairs - 1, 0.05) / math.sqrt(pairs) <= effect
        assert detectable(pairs - 2, 0.05) / math.sqrt(pairs - 1) > effect


def test_paired_interval():
    assert paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == [1.0, 2.0, 3.0]
    zeros = [0.0, 0.0, 0.0]
    [one] = estimate_differences({"a": ([1.0, 2.0, 3.0], zeros)}).values()  # deviation 1
    assert one.mean == 2.0 and one.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert one.half_together == one.half and one.p_holm == one.p
    assert one.detectable == pytest.approx(detectable(2, 0.05) / math.sqrt(3))
    assert estimate_differences({"a": ([1.0], [3.0]), "b": ([3.5], [3.0])}) == {
        "a": Difference(-2.0), "b": Difference(0.5)}
    assert estimate_differences({}) == {}


def test_intervals_and_verdicts_hold_what_they_promise():
    """Comparisons share the runs of the first variant, as in a report; the true differences are 0,
    0 and 1. What runs of one seed share cancels, however large."""
    rng = random.Random(0)
    truth = {"a": 0.0, "b": 0.0, "c": 1.0}
    n = 4000
    single = together = wrong = 0
    for _ in range(n):
        shared = [rng.gauss(0, 10) for _ in range(4)]
        first = [x + rng.gauss(0, 0.1) for x in shared]
        samples = {}
        for name, mean in truth.items():
            samples[name] = ([x + mean + rng.gauss(0, 0.1) for x in shared], first)
        found = estimate_differences(samples)
        errors = {name: abs(found[name].mean - mean) for name, mean in truth.items()}
        single += errors["a"] <= found["a"].half
        together += all(errors[name] <= found[name].half_together for name in truth)
        wrong += found["a"].found or found["b"].found
        for one in found.values():  # an interval that excludes zero goes with a verdict
            assert one.found or abs(one.mean) <= one.half_together
    assert single / n == pytest.approx(0.95, abs=0.015)
    assert 0.94 < together / n < 0.98
    assert 0.037 < wrong / n < 0.055, "with Bonferroni's factors of 3 it would be about 0.031"


def test_ranks_are_tested_as_other_programs_do():
    """The p values are those of scipy.stats.mannwhitneyu(values, reference, method="exact"), scipy 1.17.1."""
    for values, reference, expected, lower in (
        ([1.36, -0.76], [1.1, 0.2], 1.0, False),
        ([1.66, -0.2, 0.7], [-0.29, -0.74, 0.15], 0.2, False),
        ([0.24, 1.15, 2.2], [0.06, -0.41, 2.19], 0.4, False),
        ([-0.32, 2.77, -1.16, -0.07, 0.97, 2.58], [-0.95, -2.43, 0.66, -0.52, -0.39, 0.46], 0.17965367965367965, False),
        ([1.72, 1.79, 1.07, 2.79, 3.0, 1.53], [-0.45, 0.73, 0.48, -1.04, -0.46, 1.05], 0.0021645021645021645, False),
        ([0.2, -0.03, 0.51, 0.27, 0.3, -1.63, 2.05, 0.5, -0.58, 1.28, 0.61, 0.32],
         [1.05, 2.26, 0.55, 1.59, 2.16, -1.02, -0.52, 0.78, -1.71, -0.27, 1.29, 1.04], 0.31858517038218215, True),
        ([-0.05, 0.46, 0.49, 1.79, 3.59, 2.26, 2.64, 1.74, 1.78, 1.05, 1.22, -0.93],
         [-1.2, -1.29, 0.84, 0.66, 1.14, 1.56, -0.31, 1.06, 1.96, -0.01, 1.09, -0.17], 0.08873378606855523, False),
    ):
        assert rank_test(values, reference) == (pytest.approx(expected), lower)
    assert smallest_p(6) == rank_test([0.0] * 6, [1.0 + i for i in range(6)])[0] == 2 / 924


def test_equal_losses_share_their_rank():
    """All ways to choose 4 of these 8 losses, by hand."""
    values, reference = [1.0, 2.0, 2.0, 5.0], [2.0, 3.0, 3.0, 4.0]
    rank = {1.0: 1, 2.0: 3, 3.0: 5.5, 4.0: 7, 5.0: 8}
    sums = [sum(map(rank.get, chosen)) for chosen in itertools.combinations(values + reference, 4)]
    far = [total for total in sums if abs(total - 18) >= 3]  # 1 + 3 + 3 + 8 = 15, and the mean is 18
    assert rank_test(values, reference) == (pytest.approx(len(far) / 70), True)


def test_seeds_that_fall_into_two_groups_are_compared_by_ranks():
    """All six losses of b are above all of the first variant, but vary so much that no t test finds that."""
    first = [0.001, 0.002, 0.003, 0.004, 0.005, 0.006]
    samples = {"a": ([0.0015, 2.3, 0.0025, 0.0005, 0.0035, 0.0045], first), "b": ([2.3, 0.03, 0.05, 0.04, 0.06, 2.4], first)}
    by_t, by_ranks = estimate_differences(samples), estimate_differences(samples, by_ranks=True)
    assert [one.found for one in by_t.values()] == [False, False]
    assert [one.verdict for one in by_ranks.values()] == ["not distinguishable", "worse"]
    assert by_ranks["b"].p == pytest.approx(2 / 924) and by_ranks["b"].p_holm == 2 * by_ranks["b"].p
    assert by_ranks["b"].half == by_t["b"].half and by_ranks["b"].detectable is None
    lower = estimate_differences({"a": ([0.1] * 9 + [90.0], [0.2 + i / 100 for i in range(10)])}, by_ranks=True)["a"]
    assert lower.verdict == "better" and lower.mean > 0, "one seed of ten failed"
    for seeds in (1, 2):
        few = estimate_differences({"a": ([1.0] * seeds, [2.0] * seeds)}, by_ranks=True)["a"]
        assert not few.found


def test_a_detectable_difference_is_found_in_four_of_five_comparisons():
    rng = random.Random(0)
    true = detectable(3, 0.05) * 0.1 / 2  # four seeds: the true standard error is 0.1 / 2
    samples = [[rng.gauss(-true, 0.1) for _ in range(4)] for _ in range(2000)]
    zeros = [0.0] * 4
    found = [estimate_differences({"a": (sample, zeros)})["a"].verdict for sample in samples]
    assert found.count("better") / 2000 == pytest.approx(0.8, abs=0.03)
    assert found.count("worse") == 0


def test_steps_to_a_loss():
    curve = [(0, 5.0), (100, 3.0), (200, 2.0)]
    steps = [steps_to(curve, loss) for loss in (4.0, 3.0, 2.5, 2.0, 1.9)]
    assert steps == [50.0, 100.0, 150.0, 200.0, None]
    assert [steps_to(curve, loss) for loss in (5.0, 6.0)] == [0, 0], "it was never there, as it never fell to it"


def test_verdicts():
    """The single interval of the second excludes zero; the p value of all together decides."""
    verdicts = []
    for mean, p_holm in ((-0.2, 0.04), (0.2, 0.06), (0.2, 0.049), (-0.2, 1.0)):
        verdicts.append(Difference(mean, half=0.1, half_together=0.3, p_holm=p_holm).verdict)
    assert verdicts == ["better", "not distinguishable", "worse", "not distinguishable"]
    assert Difference(0.2).verdict == "one seed: no error bar"


def changed_losses(results, shift):
    """A copy of results where the loss of each variant is MHA's of the same seed plus shift[name],
    plus or minus a little, at every evaluation."""
    results = copy.deepcopy(results)
    curves = {}
    for record in results["records"]:
        if record["variant"] == "MHA":
            curves[record["seed"]] = record["curve"]
    for record in results["records"]:
        change = shift.get(record["variant"], 0.0) + record["seed"] % 2 * 1e-4
        if record["variant"] != "MHA":
            record["curve"] = [[step, loss + change] for step, loss in curves[record["seed"]]]
            record["val_loss"] = record["curve"][-1][1]
    return results


def committed():
    return results_of(ROOT / "results/compare")


def test_steps_to_a_loss_stand_where_a_difference_is_found():
    """A difference that was not distinguishable had "790 (62 s)" beside it, or "never"."""
    text = report(changed_losses(committed(), {"GQA-2": -0.1, "MQA": 0.1, "MLA": -5e-5}), [])
    cells = {}
    for line in text.splitlines():
        name, *rest = line.strip("| ").split(" | ")
        if len(rest) == 5 and "±" in line:
            cells.setdefault(name, rest[-2:])
    assert cells["MQA"] == ["worse", "never"] and cells["MLA"] == ["not distinguishable", "same"]
    word, steps = cells["GQA-2"]
    assert word == "better" and re.fullmatch(r"\d{3} \(\d+ s\)", steps)
    assert 400 < int(steps[:3]) < 700
    results = changed_losses(committed(), {"GQA-2": -0.1, "MQA": 0.1, "MLA": -5e-5})
    rate = results["speed"]["GQA-2-n_ff352"]["train"][0]["tok_s"]
    seconds = int(re.search(r"(\d+) s", report(results, []).split("| better | ")[1])[1])
    assert seconds == pytest.approx(int(steps[:3]) * 2048 / rate, abs=1)
    results["machine"]["ranks"] = 4
    assert f"({seconds / 4:.0f} s)" in report(results, [])


def test_one_model_in_both_matchings_is_one_comparison():
    """MLA has the parameters of MHA in both: its interval was counted twice in the resolution."""
    results = committed()
    results["records"] = [record for record in results["records"] if record["seed"] <= 4]
    summaries = {(s.name, s.match): s for s in summarize(results)}
    mla = summaries["MLA", "shape"]
    assert mla.difference == summaries["MLA", "params"].difference
    assert mla.difference.half_together / mla.difference.half == pytest.approx(
        5.840909 / 3.182446, rel=1e-5), "five comparisons, not six, of four seeds"
    text = report(results, [])
    [part] = re.findall(r"## What this run can resolve\n\n(\| variant .*?)\n\n", text, re.S)
    names = [line.split(" | ")[0] for line in part.splitlines()[2:]]
    assert names == ["| GQA-2", "| MQA", "| MLA", "| GQA-2 (n_ff 392)", "| MQA (n_ff 416)"]
    gqa = summaries["GQA-2", "shape"].difference
    assert gqa.detectable == pytest.approx(gqa.half / 3.182446 * 7.440484, rel=1e-5)
    assert (f"| GQA-2 | ± {gqa.half:.4f} | ± {gqa.half_together:.4f} | {gqa.detectable:.4f} | "
            f"{100 * gqa.detectable / summaries['MHA', 'shape'].loss.mean:.1f} |") in part


def test_published_differences_carry_their_sources():
    text = report(committed(), [])
    for row in PUBLISHED:
        cells = (f"| [{row.paper}]({row.url}), {row.table} | {row.params / 1e6:,.0f} | "
                 f"{row.tokens / 1e9:.0f} |")
        assert text.count(cells) == 1 and re.search(r"tables? \d", row.table)
    assert "| -0.008 (-0.3 %) | +0.015 (+0.5 %) | -0.024 (-0.9 %) |" in text
    # each variant is told how many of them it would have found
    precise = report(changed_losses(committed(), {}), [])
    counts = re.findall(r"\n\| (GQA|MQA|MLA)\S*(?: \(n_ff \d+\))? .*\| (\d+) of (\d+) \|", precise)
    totals = {kind: sum(variant in row.perplexity for row in PUBLISHED)
              for kind, variant in (("GQA", "GQA-4"), ("MQA", "MQA"), ("MLA", "MLA"))}
    assert counts == [(kind, str(totals[kind]), str(totals[kind])) for kind in ("GQA", "MQA", "MLA", "GQA", "MQA")]
    found = re.findall(r"\n\| (GQA-2|MQA|MLA) .*\| (\d+\.\d) \| (\d+) of \d+ \|", text)
    assert len(found) == 5
    for name, share, count in found:  # share is rounded
        sizes = relative_differences(name.replace("GQA-2", "GQA-4"))
        most, least = (sum(100 * size >= float(share) + change for size in sizes) for change in (-0.05, 0.05))
        assert least <= int(count) <= most


def test_one_seed_gives_no_test(comparison):
    results = results_of(comparison[0])
    results["records"] = [record for record in results["records"] if record["seed"] == 1337]
    text = report(results, [])
    assert "| one seed: no error bar | unknown |" in text
    assert "any difference above may be due to chance" in text and "published" not in text
    assert "Holm's test" not in text and "Losses are in nats per token" in text


def test_three_seeds_cannot_show_a_difference_of_ranks(comparison):
    """The cell of the steps said "same", as where a test could have found a difference."""
    results = results_of(comparison[0])
    more = [dict(record, seed=record["seed"] + 2) for record in results["records"] if record["seed"] == 1337]
    for record in (*results["records"], *more):
        record.update(val_bpb=None, val_loss=1.0)  # as where answers alone count
    for records, cell in ((results["records"] + more, "unknown"), (results["records"] + 3 * more, "same")):
        text = report(dict(results, records=records), [])
        assert f"| not distinguishable | {cell} |" in text and ("however large: use more seeds" in text) == (cell == "unknown")


def test_one_variant_is_compared_to_nothing(comparison):
    results = results_of(comparison[0])
    results["records"] = [record for record in results["records"] if record["variant"] == "MHA"]
    text = report(results, [])
    assert "One variant: nothing is compared." in text
    assert "Holm" not in text and "Differences are" not in text


@pytest.mark.parametrize("change", [dict(val_loss=0.0), dict(val_bpb=None)])
def test_no_difference_is_given_in_percent_of_a_loss_of_nearly_nothing(comparison, change):
    """As that of a model which answers every question: it may even be 0."""
    results = results_of(comparison[0])
    for record in results["records"]:
        record["curve"][-1][1] = change.get("val_loss", record["val_loss"])
        record.update(change)
    text = report(results, [])
    assert "in % of the loss" not in text and "published" not in text
    answers = "val_bpb" in change
    assert ("exact test of ranks" in text) == ("With 2 seeds and 1 comparison, a test of ranks cannot find a difference" in text) == answers
    assert ("those of Student's t test" in text) == (not answers)
    assert ("found with 80 % power" in text) == (not answers)


# -- tables and pictures ---------------------------------------------------------------------------

def test_tables_hold_any_name():
    assert table(["a|b"], [["x|y"]]) == "| a\\|b |\n|---|\n| x\\|y |"


def test_curves_are_paired_by_seed(comparison):
    mha, mqa = summarize(results_of(comparison[0]))
    points = paired_curves(mqa, mha, 4)
    assert [step for step, _ in points] == [4, 8, 12]
    by_hand = [b - a for a, b in zip((c[-1][1] for c in mha.curves),
                                     (c[-1][1] for c in mqa.curves), strict=True)]
    assert points[-1][1] == by_hand and len(by_hand) == 2
    assert sum(by_hand) / 2 == pytest.approx(mqa.difference.mean)


def test_the_front_holds_what_no_other_variant_beats():
    a, b, c, d, e = (Point(1, 5.0, "a"), Point(2, 3.0, "b"), Point(2, 4.0, "c"),
                     Point(3, 3.5, "d"), Point(4, 1.0, "e"))
    assert front([e, d, c, b, a], lower=True) == [a, b, e]
    assert front([e, d, c, b, a], lower=False) == [a]
    assert front([b, Point(2, 9.0, "f")], lower=False) == [Point(2, 9.0, "f")]


def test_names_on_lines_do_not_overlap():
    assert apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert apart([0.3, 0.3, 0.9], 0.1) == pytest.approx([0.25, 0.35, 0.9])
    assert apart([0.3, 0.3, 0.36, 0.5], 0.1) == pytest.approx([0.215, 0.315, 0.415, 0.515])


def test_pictures_show_what_they_claim(comparison, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    seen = {}

    def watched(figure, path, **kwargs):
        seen[path.stem] = figure
        return save(figure, path, **kwargs)
    save = figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", watched)
    results = json.loads((ROOT / "results/compare/results.json").read_text(encoding="utf-8"))
    seeds = results["settings"]["seeds"]
    for record in results["records"]:
        if record["variant"] == "MLA":
            record["variant"] = "$\\bad$ $x"  # no formula
    compare.write_report(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png", "decode.png", "front.png", "quality.png", "report.md"]
    for name, words in {"quality": ("paired by seed", "95 % intervals", f"dots are the {seeds} seeds",
                                    "thin, all together"),
                        "curves": ("paired by seed",),
                        "decode": ("AMD EPYC", "float32", "random weights")}.items():
        assert all(word in seen[name].get_suptitle() for word in words)
        left, right = seen[name].axes
        assert left.get_ylim() == right.get_ylim()
    for axis in seen["front"].axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert len(boxes) == 4 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert "in nats" in seen["quality"].axes[0].get_xlabel()
    assert "minus MHA,\nin nats" in seen["curves"].axes[0].get_ylabel()
    assert "after the warm-up of 100 steps" in seen["curves"].axes[0].get_xlabel()
    assert all("log scale" in text for text in (
        seen["decode"].axes[0].get_xlabel(), seen["decode"].axes[0].get_ylabel()))
    dots = [line for line in seen["quality"].axes[0].lines if len(line.get_xdata()) == seeds]
    assert len(dots) == 3, "a dot for each seed of each variant but the first"
    widths = []
    for bars in seen["quality"].axes[0].containers:
        [[(left, _), (right, _)]] = bars[2][0].get_segments()
        widths.append((right - left) / 2)
    wanted = []
    for summary in summarize(results):
        if summary.match == "shape" and not summary.is_first:
            wanted += [summary.difference.half_together, summary.difference.half]
    assert widths == pytest.approx(wanted)


def test_the_floor_of_decoding_has_one_bandwidth():
    def row(bytes_per_step, step_ms, mbu):
        return dict(bytes_per_step=bytes_per_step, step_ms=step_ms, mbu=mbu)
    speed = {"a": {"decode": [row(1e8, 10, 0.5)]}, "b": {"decode": [row(1e9, 100, 0.4)]}}
    results = {"speed": speed, "machine": {"cache_bytes": 2**25}}
    assert bandwidth_beyond_cache(results) == (1e9 / 0.1 / 0.4, 2**25)
    assert bandwidth_beyond_cache({"speed": speed, "machine": {}}) is None
    in_cache = {"speed": speed, "machine": {"cache_bytes": 10**12}}
    assert bandwidth_beyond_cache(in_cache) is None, "the legend named a line that was not there"
    speed["a"]["decode"][0]["mbu"] = speed["b"]["decode"][0]["mbu"] = None
    assert bandwidth_beyond_cache(results) is None


# -- errors ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("args,words", [
    (["--seeds=0"], "seeds must be at least 1"),
    (["--n_kv_head=4,3"], "n_kv_head=3 does not divide n_head=4: choose one of [1, 2, 4]"),
    (["--seeds=2,3"], "seeds takes one value in a comparison"),
    (["--dataset=a,b"], "dataset takes one value"),
    (["--max_steps=5,6"], "max_steps takes one value"),
    (["--tokens_per_step=128,256"], "tokens_per_step takes one value"),
    (["--eval_only=False,True"], "eval_only takes one value"),
    (["--log_interval=1,2"], "log_interval takes one value"),
    (["--match=size"], "match must be both or shape or params"),
    (["--init_from=resume"], "leave out init_from"),
    (["--report_only=True"], "there is no"),
    (["--decode_batch_size=0"], "decode_batch_size must be at least 1"),
    (["--n_embd=32,256"], "no n_ff reduces"),
    # what only a run or a timing would find
    (["--vocab_size=200"], "has 257 token ids, more than vocab_size=200"),
    (["--trainable=q_proj,nothing"], "no parameter matches trainable='nothing'"),
    (["--decode_batch_size=None,4"], "decode_batch_size takes a list of numbers: leave None out"),
    (["--report_only=True", "--decode_prompt_len=8", "--out_dir=a,b"], "out_dir takes one value"),
    (["--parallel=fsdp"], "parallel=fsdp needs several GPUs: choose --parallel=ddp"),
    (["--optimizer=adamw,muon", "--parallel=fsdp"], "parallel=fsdp"),
    (["--batch_size=1,3"], "batch_size 3 x 1 ranks x block_size 32 = 96"),
    (["--block_size=65536", "--tokens_per_step=65536"], "block_size=65536 needs 65537 tokens"),
    (["--decode_batch_size=1,0"], "batch_size must be at least 1"),
    (["--decode_prompt_len=8,-1"], "prompt_len must be at least 1"),
    (["--vocab_size=1000000000000"], "GB: lower n_layer, n_embd"),
])
def test_bad_settings_of_compare(toy_data, tmp_path, monkeypatch, capsys, args, words):
    """Those that only a run could find were refused after minutes of timing, and the results.json
    that was written before blocked the corrected command."""
    monkeypatch.setattr(compare, "measure_speed", stop)
    out_dir = tmp_path / "new" / "out"
    with pytest.raises(SystemExit) as exit:
        compare.main([f"--dataset={toy_data}", f"--out_dir={out_dir}", *TOY, *args])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and words in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_two_comparisons_do_not_share_a_folder(again, capsys):
    """With --overwrite=True, one removed the runs that the other was training."""
    folder, args = again
    before = contents(folder)
    with files.lock(folder, "busy"):
        assert "another compare.py writes to" in fails(compare.main, [*args, "--overwrite=True"], capsys)
    assert contents(folder) == before


def test_a_failed_timing_leaves_things_as_they_were(again, tmp_path, monkeypatch, capsys):
    def no_memory(*args):
        raise UserError("bench.py failed")
    monkeypatch.setattr(compare, "run_bench", no_memory)
    folder, args = again
    before = contents(folder)
    new = tmp_path / "new" / "out"
    for more in ("--overwrite=True", f"--out_dir={new}"):
        with pytest.raises(SystemExit) as exit:
            compare.main([*args, more])
        assert exit.value.code == 2 and "bench.py failed" in capsys.readouterr().err
    assert contents(folder) == before and not (tmp_path / "new").exists()


def test_overwrite_replaces_all_runs(again, monkeypatch, capsys):
    folder, args = again
    monkeypatch.setattr(compare, "measure_speed", lambda *args: results_of(folder)["speed"])
    (folder / "runs/old").mkdir()
    for name in ("metrics.png", "report.md", "notes.png"):
        (folder / name).write_text("old", encoding="utf-8")
    compare.main([*args, "--overwrite=True"])
    assert (folder / "report.md").read_text(encoding="utf-8") != "old"
    assert not (folder / "metrics.png").exists() and (folder / "notes.png").exists()
    assert "4 runs of 12 steps, 0 of them finished" in capsys.readouterr().out
    assert len(list((folder / "runs").iterdir())) == 4


def test_a_new_out_dir_cannot_be_written(again, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        compare.main([*again[1], f"--out_dir={tmp_path / 'file' / 'out'}"])
    assert exit.value.code == 2 and "choose another --out_dir" in capsys.readouterr().err
    assert (tmp_path / "file").is_file()


def test_a_foreign_results_file_is_refused(toy_data, tmp_path, capsys):
    args = [f"--dataset={toy_data}", f"--out_dir={tmp_path}", *TOY]
    path = tmp_path / "results.json"
    for text in ("{}", "[1]", "{", '{"records": []}'):
        path.write_text(text, encoding="utf-8")
        for more in ([], ["--report_only=True"]):
            with pytest.raises(SystemExit) as exit:
                compare.main([*args, *more])
            assert exit.value.code == 2
            assert "is not a results file of compare.py" in capsys.readouterr().err
        assert path.read_text(encoding="utf-8") == text
    path.unlink()
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit) as exit:
        compare.main(args)
    assert exit.value.code == 2 and "holds runs, but there is no" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
