"""compare.py: what is held equal, what a restart does, and that the report says what was measured."""
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare
from compare import matching_n_ff, paired, plan, steps_to, student_t, verdict
from nanogqa.configurator import parse

ROOT = Path(__file__).resolve().parents[1]
TOY = ["--device=cpu", "--n_layer=1", "--n_head=4", "--n_embd=32", "--block_size=32", "--tokens_per_step=128", "--max_steps=12",
       "--eval_interval=4", "--eval_tokens=512", "--warmup_steps=2", "--decode_batch_size=1,2", "--decode_prompt_len=8"]


def planned(toy_data, *args):
    return plan(parse(compare.CompareConfig, [f"--dataset={toy_data}", *TOY, *args], "", axes=True))


@pytest.fixture(scope="module")
def comparison(toy_data, tmp_path_factory):
    """A comparison that was killed after its first run and then ran to its end: (folder, first run's files before, output)."""
    folder = tmp_path_factory.mktemp("compare")
    args = [f"--dataset={toy_data}", f"--out_dir={folder}", *TOY, "--n_kv_head=4,1", "--seeds=2", "--match=params"]
    process = subprocess.Popen([sys.executable, ROOT / "compare.py", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = folder / "runs" / "MHA-n_ff96-seed1337"
    deadline = time.time() + 200
    while not (log := compare.log_rows(first)) or log[-1]["step"] < 12 or len(list(folder.glob("runs/*"))) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1)  # the training it leaves behind ends at its next line, which nobody reads
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()}
    out = subprocess.run([sys.executable, ROOT / "compare.py", *args], capture_output=True, text=True, check=True).stdout
    return folder, args, before, out


def test_a_killed_comparison_goes_on_without_repeating_finished_runs(comparison):
    folder, _, before, out = comparison
    first = folder / "runs" / "MHA-n_ff96-seed1337"
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()} == before
    assert re.search(r"^4 runs of 12 steps, 1 of them finished", out, re.M)
    results = json.loads((folder / "results.json").read_text())
    assert [(r["variant"], r["seed"]) for r in results["records"]] == [("MHA", 1337), ("MHA", 1338), ("MQA", 1337), ("MQA", 1338)]
    for record in results["records"]:
        assert [step for step, _ in record["curve"]] == [0, 4, 8, 12] and record["curve"][-1][1] == record["val_loss"]
        rows = compare.log_rows(folder / "runs" / record["run"])
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}) and rows[-1]["val_loss"] == record["val_loss"]
    assert results["records"][0]["curve"] != results["records"][1]["curve"], "another seed is another run"


def test_the_report_says_what_results_json_holds(comparison):
    folder, args, *_ = comparison
    results, report = json.loads((folder / "results.json").read_text()), (folder / "report.md").read_text()
    losses = {name: [r["val_loss"] for r in results["records"] if r["variant"] == name] for name in ("MHA", "MQA")}
    for name, (a, b) in losses.items():
        line = next(line for line in report.splitlines() if line.startswith(f"| {name} |"))
        record = next(r for r in results["records"] if r["variant"] == name)
        assert f"{(a + b) / 2:.4f} ± {abs(a - b) / 2:.4f}" in line and f"{record['params']:,} (" in line
        assert f"| {record['kv_bytes_per_token']:,} |" in line and f"| {record['n_ff']} |" in line
    (a, b), (c, d) = losses["MHA"], losses["MQA"]
    half = 12.7062 * abs((c - a) - (d - b)) / 2
    shown = re.search(r"\| ([+-]\d+\.\d{4}) ± (\d+\.\d{4}) \| ([^|]*) \|", report)
    assert float(shown[1]) == pytest.approx((c + d - a - b) / 2, abs=6e-5) and float(shown[2]) == pytest.approx(half, abs=1e-4)
    assert shown[3] == verdict((c + d - a - b) / 2, half) and "- MQA: n_head 4, n_kv_head 1\n" in report
    speed = results["speed"][results["records"][0]["shape"]]
    assert [cell["batch_size"] for cell in speed["decode"]] == [1, 2] and f"| {speed['decode'][1]['step_ms']:.2f} |" in report
    assert results["records"][0]["kv_bytes_per_token"] == 4 * results["records"][2]["kv_bytes_per_token"] == 2 * 32 * 4
    text = report
    (folder / "report.md").unlink()
    compare.main([*args, "--report_only=True"])
    assert (folder / "report.md").read_text() == text


def test_other_settings_do_not_mix_with_results_that_are_there(comparison, capsys):
    folder, args, *_ = comparison
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for change, words in (("--max_steps=13", "max_steps 12 there, 13 here"), ("--n_kv_head=4,2", "other variants"),
                          ("--seeds=3", "seeds 2 there, 3 here"), ("--learning_rate=1e-3", "learning_rate 0.003 there")):
        with pytest.raises(SystemExit) as exit:
            compare.main([*args, change])
        error = capsys.readouterr().err.strip()
        assert exit.value.code == 2 and words in error and "\n" not in error and "--overwrite=True" in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_results_of_before_a_setting_existed_are_gone_on_with(comparison, capsys):
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
    _, _, variants = planned(toy_data, "--n_kv_head=4,1", "--seeds=2", "--match=params")
    compare.run_training(tmp_path / "again", variants[1].config, 1337, compare.tqdm(disable=True))
    def curve(folder):
        return [(row["step"], row["train_loss"], row["val_loss"], row["grad_norm"]) for row in compare.log_rows(folder)]
    assert curve(tmp_path / "again") == curve(comparison[0] / "runs" / variants[1].run(1337))


@pytest.mark.parametrize("args", [[], ["--qk_norm=False", "--tie_embeddings=False"], ["--n_embd=96", "--n_head=12", "--n_kv_head=12,4,2,1"],
                                  ["--controls=True"], ["--n_layer=3", "--head_dim=16", "--qkv_bias=True"]], ids=str)
def test_matched_parameters_agree(toy_data, args):
    base, _, variants = planned(toy_data, *args)
    by_match = {match: [v for v in variants if v.match == match] for match in ("shape", "params")}
    first = variants[0].facts["params"]
    assert variants[0].name == "MHA" and [v.name for v in by_match["shape"]] == [v.name for v in by_match["params"]]
    for v in by_match["params"]:
        assert abs(v.facts["params"] / first - 1) < 0.005
    assert len({v.config.n_ff for v in by_match["shape"]}) == 1 and by_match["shape"][-1].facts["params"] < 0.98 * first


def test_rounding_keeps_half_a_percent(toy_data):
    config = planned(toy_data, "--n_kv_head=4,1")[2][0].config
    each = 3 * 1 * 32
    assert matching_n_ff(config, 100_000, 100_000 + 21 * each) == 96 + 24  # 117 -> 120, 288 parameters of 102,016
    assert matching_n_ff(config, 10_000, 10_000 + 20 * each) == 96 + 20    # the multiple of 8 would be 3 % off


def test_controls_have_the_cache_of_what_they_control_for(toy_data):
    variants = [v for v in planned(toy_data, "--controls=True", "--match=shape")[2]]
    assert [v.name for v in variants] == ["MHA", "GQA-2", "2 heads", "heads of 4", "MQA", "1 head", "heads of 2"]
    cache = {v.name: v.facts["kv_bytes_per_token"] for v in variants}
    assert cache["GQA-2"] == cache["2 heads"] == cache["heads of 4"] == cache["MHA"] // 2
    assert cache["MQA"] == cache["1 head"] == cache["heads of 2"] == cache["MHA"] // 4


def test_any_list_is_an_axis(toy_data):
    names = [v.name for v in planned(toy_data, "--match=shape", "--qk_norm=True,False", "--learning_rate=1e-3,3e-3")[2]]
    assert names == ["qk_norm=True learning_rate=0.001", "qk_norm=True learning_rate=0.003",
                     "qk_norm=False learning_rate=0.001", "qk_norm=False learning_rate=0.003"]
    assert [v.name for v in planned(toy_data, "--match=shape", "--n_head=1,2,4,8")[2]] == [f"n_head={n}" for n in (1, 2, 4, 8)]
    assert [v.name for v in planned(toy_data, "--match=shape", "--n_kv_head=1,4", "--qk_norm=True,False")[2]] == [
        "MHA qk_norm=True", "MHA qk_norm=False", "MQA qk_norm=True", "MQA qk_norm=False"]


def test_quantiles_of_t():
    for df, value in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)):  # any table of t
        assert student_t(df) == pytest.approx(value, rel=1e-5)


def test_paired_interval():
    mean, half = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])  # differences 1, 2, 3: deviation 1
    assert mean == 2.0 and half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert paired([1.0], [3.0]) == (-2.0, None)
    rng, covered, n = random.Random(0), 0, 4000
    for _ in range(n):  # what the seeds share cancels, however large, and 95 % of the intervals hold the truth
        shared = [rng.gauss(0, 10) for _ in range(3)]
        mean, half = paired([x + 0.3 + rng.gauss(0, 0.1) for x in shared], [x + rng.gauss(0, 0.1) for x in shared])
        covered += abs(mean - 0.3) <= half
    assert covered / n == pytest.approx(0.95, abs=0.015)


def test_steps_to_a_loss():
    curve = [(0, 5.0), (100, 3.0), (200, 2.0)]
    assert [steps_to(curve, loss) for loss in (4.0, 3.0, 2.5, 2.0, 1.9)] == [50.0, 100.0, 150.0, 200.0, None]


def test_verdicts():
    assert [verdict(*x) for x in ((-0.2, 0.1), (0.2, 0.1), (0.05, 0.1), (-0.1, 0.1), (0.2, None))] == [
        "better", "worse", "not distinguishable", "not distinguishable", "one seed: no error bar"]


@pytest.mark.parametrize("args,words", [
    (["--seeds=0"], "seeds must be at least 1"), (["--n_kv_head=4,3"], "n_kv_head=3 does not divide n_head=4: choose one of [1, 2, 4]"),
    (["--seeds=2,3"], "seeds takes one value in a comparison"), (["--dataset=a,b"], "dataset takes one value"),
    (["--max_steps=5,6"], "max_steps takes one value"),
    (["--match=size"], "match must be both or shape or params"), (["--init_from=resume"], "leave out init_from"),
    (["--report_only=True"], "there is no"), (["--decode_batch_size=0"], "decode_batch_size must be at least 1"),
    (["--n_embd=32,256"], "no n_ff brings")])
def test_bad_settings_of_compare(toy_data, tmp_path, capsys, args, words):
    with pytest.raises(SystemExit) as exit:
        compare.main([f"--dataset={toy_data}", f"--out_dir={tmp_path / 'out'}", *TOY, *args])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and words in error and "\n" not in error and not (tmp_path / "out").exists()


def test_a_foreign_results_file_is_refused(toy_data, tmp_path, capsys):
    for text in ("{}", "[1]", "{", '{"records": []}'):
        (tmp_path / "results.json").write_text(text)
        for more in ([], ["--report_only=True"]):
            with pytest.raises(SystemExit) as exit:
                compare.main([f"--dataset={toy_data}", f"--out_dir={tmp_path}", *TOY, *more])
            assert exit.value.code == 2 and "is no results file of this program" in capsys.readouterr().err
        assert (tmp_path / "results.json").read_text() == text
    (tmp_path / "results.json").unlink()
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit) as exit:
        compare.main([f"--dataset={toy_data}", f"--out_dir={tmp_path}", *TOY])
    assert exit.value.code == 2 and "does not say of which settings" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
