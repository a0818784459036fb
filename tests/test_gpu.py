"""results/gpu.py: rows, their processes, the time they may take, and the tables made of them."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "results"))
import gpu

PLACE = {"device": "some GPU", "tree": "0123"}


def row(name, function="gpu_check.mla_ways", **settings):
    if function == "gpu_check.mla_ways":
        settings = {"device": "cpu", "dtype": "float32", "toy": True, **settings}
    return gpu.Row("check", name, function, settings, 1.0)


def measured(name, part="check", place=PLACE, target=None, beside="", **outcome):
    return dict(part=part, name=name, settings={}, **place, outcome=outcome, target=target or {},
                beside=beside)


def forbidden(*arguments):
    raise AssertionError("no process should start")


def test_rows_are_measured_once_and_failures_end_nothing_else(tmp_path, monkeypatch, capsys):
    rows = [row("good"), row("raises", device="nonsense"), row("dies", "os._exit", status=3),
            row("after them")]
    monkeypatch.setattr(gpu, "plan", lambda config: rows)
    argv = ["--smoke=True", f"--out_dir={tmp_path}", "--minutes=3"]
    gpu.main(argv)
    found = {row["name"]: row["outcome"] for row in gpu.load(tmp_path / "gpu.json")}
    assert list(found) == [row.name for row in rows]
    for name in ("good", "after them"):
        assert not gpu.has_failed(found[name]) and found[name]["took_s"] > 0
    assert found["raises"]["error"].startswith("UserError: unknown device 'nonsense'")
    assert found["dies"]["error"] == "its process ended with code 3: see gpu.log"
    assert "Traceback" in (tmp_path / "gpu.log").read_text(encoding="utf-8")
    written = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| good | pass |" in written and "| raises | failed | UserError" in written

    monkeypatch.setattr(gpu, "Worker", forbidden)
    capsys.readouterr()
    gpu.main(argv)
    assert capsys.readouterr().out.count("measured before") == 4
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") == written
    with pytest.raises(AssertionError, match="no process"):
        gpu.main([*argv, "--again=True"])


def test_a_row_that_takes_too_long_is_ended(tmp_path):
    worker = gpu.Worker(tmp_path, "0123", "check", "inductor")
    outcome = worker.measure(row("slow"), 0.05)
    assert outcome["error"] == "not finished after 0 s" and outcome["timeout"]
    assert worker.process.wait(10) == -9


def test_nothing_starts_that_would_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "Worker", forbidden)
    gpu.main(["--smoke=True", f"--out_dir={tmp_path}", "--minutes=0.2"])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(gpu.plan(gpu.GpuConfig(smoke=True)))
    assert all("skipped, it takes about" in line for line in out)
    assert gpu.load(tmp_path / "gpu.json") == []


def test_the_plan_keeps_to_its_parts_and_every_row_can_be_identified():
    for smoke in (True, False):
        rows = gpu.plan(gpu.GpuConfig(smoke=smoke))
        keys = {json.dumps([row.name, row.settings]) for row in rows}
        assert len(keys) == len(rows)
        assert {row.part for row in rows} == set(gpu.PARTS)
        names = {row.name for row in rows}
        assert all(row.beside in names for row in rows if row.beside)
    some = gpu.plan(gpu.GpuConfig(parts="train,check", rows="Muon"))
    assert [row.part for row in some] == ["train", "check"]


def test_rows_of_another_device_or_version_are_kept_apart():
    good = row("good")
    found = measured("good") | {"settings": good.settings}
    assert gpu.find([found], good, PLACE) is found
    assert gpu.find([found], good, {**PLACE, "tree": "4567"}) is None
    assert gpu.find([found], good, {**PLACE, "device": "another GPU"}) is None
    assert gpu.find([found], row("good", toy=False), PLACE) is None


def test_tables_show_what_was_measured():
    checks = [dict(what="a", figure=2e-6, limit=1e-4, passed=True),
              dict(what="b", figure=0.0, limit=0, passed=True),
              dict(what="c", figure=None, limit=1, passed=False)]
    rows = [
        measured("fine", checks=checks[:2]),
        measured("not fine", checks=checks, note="why"),
        measured("broken", error="ValueError: no"),
        measured("MHA", "decode", step_ms=2.0, decode_tok_s=500.0, mbu=0.5, bytes_per_step=1000,
                 target={"mbu": 0.75}),
        measured("MQA", "decode", step_ms=0.5, bytes_per_step=100, beside="MHA"),
        measured("fine", place={**PLACE, "tree": "4567"}, checks=checks[:1]),
    ]
    text = gpu.tables(rows)
    assert text.index("Programs 4567.") < text.index("Programs 0123.")
    lines = text.splitlines()
    assert "| fine | pass | a: 2e-06 (at most 0.0001) |  |" in lines
    assert "| not fine | fail | c: not finite (at most 1) | why |" in lines
    assert "| broken | failed | ValueError: no |  |" in lines
    assert "| MHA | 2.000 | 500 | 0.50 (target 0.75) | 1,000 |  |  |  |" in lines
    assert "| MQA | 0.500 |  |  | 100 | MHA | 0.25 | 0.10 |" in lines


@pytest.mark.parametrize("argv,message", [
    (["--parts=check,decoding"], "unknown part 'decoding': choose among check, decode"),
    (["--minutes=-1"], "minutes must be at least 0"),
    pytest.param([], "there is no CUDA device here", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one")),
])
def test_errors_are_one_sentence(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main([*argv, f"--out_dir={tmp_path / 'new'}"])
    assert error.value.code == 2 and not (tmp_path / "new").exists()
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"name": 3}]}'])
def test_a_damaged_file_is_refused_and_stays(content, tmp_path, capsys):
    (tmp_path / "gpu.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        gpu.main(["--smoke=True", f"--out_dir={tmp_path}"])
    assert "is damaged" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text(encoding="utf-8") == content


def test_rows_do_what_their_names_say(monkeypatch):
    """Rows of decoding ended in a TypeError, the one of memory looked for another message, and that of MLA compared one way
    with itself."""
    import gpu_check
    import gpu_speed

    import bench
    import model
    monkeypatch.setattr(bench, "load_model", bench.load_model)  # which decode replaces
    decoded = gpu_speed.decode(device="cpu", dtype="float32", compile=False, n_layer=1, n_head=2, n_embd=32, prompt_len=8,
                               new_tokens=2, repeats=1)
    assert decoded["step_ms"] > 0
    assert all(check["passed"] for check in gpu_check.out_of_memory("cpu", True)["checks"])
    ways = []
    for name in ("expanded", "absorbed"):
        whole = getattr(model.LatentAttention, name)
        watched = lambda *args, name=name, whole=whole: ways.append(name) or whole(*args)  # noqa: E731
        monkeypatch.setattr(model.LatentAttention, name, watched)
    gpu_check.mla_ways("cpu", "float32", True)
    assert ways == ["expanded", "absorbed"]
