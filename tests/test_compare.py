"""compare.py and nanogqa/report.py: what is held equal, what resumes, what the report says."""
import copy
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

import compare
from compare import Run, matching_n_ff, plan, run_training
from nanogqa.configurator import parse
from nanogqa.log import read_rows
from nanogqa.report import paired, report, steps_to, student_t, summarize, verdict

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


@pytest.fixture(scope="module")
def comparison(toy_data, tmp_path_factory):
    """A comparison, killed after its first run and then resumed.

    (folder, arguments, files of the first run before the second call, its output)
    """
    folder = tmp_path_factory.mktemp("compare")
    args = [f"--dataset={toy_data}", f"--out_dir={folder}", *TOY, "--n_kv_head=4,1", "--seeds=2",
            "--match=params"]
    command = [sys.executable, ROOT / "compare.py", *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = folder / "runs" / "MHA-n_ff96-seed1337"
    deadline = time.time() + 200
    while True:
        rows = rows_of(first)
        if rows and rows[-1]["step"] >= 12 and len(list(folder.glob("runs/*"))) >= 2:
            break
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait(timeout=60)
    time.sleep(1)  # the orphaned training ends at its next line, since nobody reads its output
    before = state_of(first)
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return folder, args, before, out


# -- a comparison and its report -------------------------------------------------------------------

def test_a_killed_comparison_resumes_without_repeating_finished_runs(comparison):
    folder, _, before, out = comparison
    assert state_of(folder / "runs" / "MHA-n_ff96-seed1337") == before
    assert re.search(r"^4 runs of 12 steps, 1 of them finished", out, re.M)
    records = json.loads((folder / "results.json").read_text())["records"]
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
    results = json.loads((folder / "results.json").read_text())
    text = (folder / "report.md").read_text()
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
    shown = re.search(r"\| ([+-]\d+\.\d{4}) ± (\d+\.\d{4}) \| ([^|]*) \|", text)
    assert float(shown[1]) == pytest.approx(difference, abs=6e-5)
    assert float(shown[2]) == pytest.approx(half, abs=1e-4)
    assert shown[3] == verdict(difference, half)
    assert "- MQA: n_head 4, n_kv_head 1\n" in text
    speed = results["speed"][records[0]["shape"]]
    assert [cell["batch_size"] for cell in speed["decode"]] == [1, 2]
    assert f"| {speed['decode'][1]['step_ms']:.2f} |" in text
    mha, mqa = records[0]["kv_bytes_per_token"], records[2]["kv_bytes_per_token"]
    assert mha == 4 * mqa == 2 * 32 * 4
    (folder / "report.md").unlink()
    compare.main([*args, "--report_only=True"])
    assert (folder / "report.md").read_text() == text


def test_records_and_report_have_every_metric(comparison):
    folder, *_ = comparison
    results = json.loads((folder / "results.json").read_text())
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
    assert "| bits per byte | token accuracy | difference to MHA" in text
    mha, mqa = (line for line in text.splitlines() if re.match(r"\| M[HQ]A \| \d+ \|", line))
    assert "| 0.3000 ± 0.0500 |" in mha and "| 0.5000 ± 0.0000 |" in mqa
    del results["records"][2]["metrics"]["val_token_accuracy"]
    assert "0.5000 ± 0.0000" not in report(results, []), "a metric that one seed lacks has no mean"
    assert [list(s.metrics) for s in summarize(results)] == [["val_token_accuracy"], []]


def test_results_of_other_settings_are_refused(comparison, capsys):
    folder, args, *_ = comparison
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for change, words in (("--max_steps=13", "max_steps 12 there, 13 here"),
                          ("--n_kv_head=4,2", "other variants"),
                          ("--seeds=3", "seeds 2 there, 3 here"),
                          ("--learning_rate=1e-3", "learning_rate 0.003 there")):
        with pytest.raises(SystemExit) as exit:
            compare.main([*args, change])
        error = capsys.readouterr().err.strip()
        assert exit.value.code == 2 and words in error and "\n" not in error
        assert "--overwrite=True" in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_results_without_newer_settings_are_resumed(comparison, capsys):
    folder, args, *_ = comparison
    path = folder / "results.json"
    text = path.read_text()
    old = json.loads(text)
    for values in (old["settings"], *old["variants"]):
        for key in ("attention", "kv_lora_rank", "rope_head_dim"):
            del values[key]
    path.write_text(json.dumps(old))
    compare.main(args)
    assert "4 of them finished" in capsys.readouterr().out
    path.write_text(text)


def test_two_runs_of_one_variant_and_seed_give_one_curve(toy_data, tmp_path, comparison):
    variant = planned(toy_data, "--n_kv_head=4,1", "--seeds=2", "--match=params")[2][1]
    run_training(Run(variant.config, variant.shape, 1337, tmp_path / "again"), tqdm(disable=True))

    def curve(folder):
        keys = ("step", "train_loss", "val_loss", "grad_norm")
        return [[row[key] for key in keys] for row in rows_of(folder)]
    assert curve(tmp_path / "again") == curve(comparison[0] / "runs" / variant.run_name(1337))


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


def test_controls_have_the_cache_of_what_they_control_for(toy_data):
    variants = planned(toy_data, "--controls=True", "--match=shape")[2]
    assert [v.name for v in variants] == [
        "MHA", "GQA-2", "2 heads", "heads of 4", "MQA", "1 head", "heads of 2"]
    cache = {v.name: v.facts["kv_bytes_per_token"] for v in variants}
    assert cache["GQA-2"] == cache["2 heads"] == cache["heads of 4"] == cache["MHA"] // 2
    assert cache["MQA"] == cache["1 head"] == cache["heads of 2"] == cache["MHA"] // 4


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


def test_paired_interval():
    mean, half = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])  # differences 1, 2, 3: deviation 1
    assert mean == 2.0 and half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert paired([1.0], [3.0]) == (-2.0, None)
    # what runs of one seed share cancels, however large, and 95 % of the intervals hold the truth
    rng, covered, n = random.Random(0), 0, 4000
    for _ in range(n):
        shared = [rng.gauss(0, 10) for _ in range(3)]
        mean, half = paired([x + 0.3 + rng.gauss(0, 0.1) for x in shared],
                            [x + rng.gauss(0, 0.1) for x in shared])
        covered += abs(mean - 0.3) <= half
    assert covered / n == pytest.approx(0.95, abs=0.015)


def test_steps_to_a_loss():
    curve = [(0, 5.0), (100, 3.0), (200, 2.0)]
    steps = [steps_to(curve, loss) for loss in (4.0, 3.0, 2.5, 2.0, 1.9)]
    assert steps == [50.0, 100.0, 150.0, 200.0, None]


def test_verdicts():
    differences = ((-0.2, 0.1), (0.2, 0.1), (0.05, 0.1), (-0.1, 0.1), (0.2, None))
    assert [verdict(*x) for x in differences] == [
        "better", "worse", "not distinguishable", "not distinguishable", "one seed: no error bar"]


# -- errors ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("args,words", [
    (["--seeds=0"], "seeds must be at least 1"),
    (["--n_kv_head=4,3"], "n_kv_head=3 does not divide n_head=4: choose one of [1, 2, 4]"),
    (["--seeds=2,3"], "seeds takes one value in a comparison"),
    (["--dataset=a,b"], "dataset takes one value"),
    (["--max_steps=5,6"], "max_steps takes one value"),
    (["--match=size"], "match must be both or shape or params"),
    (["--init_from=resume"], "leave out init_from"),
    (["--report_only=True"], "there is no"),
    (["--decode_batch_size=0"], "decode_batch_size must be at least 1"),
    (["--n_embd=32,256"], "no n_ff reduces"),
])
def test_bad_settings_of_compare(toy_data, tmp_path, capsys, args, words):
    out_dir = tmp_path / "out"
    with pytest.raises(SystemExit) as exit:
        compare.main([f"--dataset={toy_data}", f"--out_dir={out_dir}", *TOY, *args])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and words in error and "\n" not in error and not out_dir.exists()


def test_a_foreign_results_file_is_refused(toy_data, tmp_path, capsys):
    args = [f"--dataset={toy_data}", f"--out_dir={tmp_path}", *TOY]
    path = tmp_path / "results.json"
    for text in ("{}", "[1]", "{", '{"records": []}'):
        path.write_text(text)
        for more in ([], ["--report_only=True"]):
            with pytest.raises(SystemExit) as exit:
                compare.main([*args, *more])
            assert exit.value.code == 2
            assert "is not a results file of compare.py" in capsys.readouterr().err
        assert path.read_text() == text
    path.unlink()
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit) as exit:
        compare.main(args)
    assert exit.value.code == 2 and "holds runs, but there is no" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
