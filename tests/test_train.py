"""The training loop: the same numbers however a step is cut up, interrupted or resumed."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, model_of
from test_inputs import fails

import model
import sample
import train
from nanogqa import checkpoint, distributed, saver
from nanogqa.dataloader import Dataset, val_windows
from model import GPT, GPTConfig
from nanogqa.batches import Batches, MicroBatch
from nanogqa.runtime import pick_runtime
from train import TrainConfig, learning_rate

ROOT = Path(__file__).resolve().parents[1]
TIMING = ("tokens_per_sec", "mfu")


def rows(out_dir):
    """metrics.jsonl without what depends on the clock."""
    lines = (Path(out_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def weights(out_dir):
    return load(out_dir)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def groups_of(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def out(args, folder):
    return [*args, f"--out_dir={folder}"]


def torchrun(args, ranks=2, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train.py", *args]
    return subprocess.Popen(command, cwd=ROOT, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), **kwargs)


def test_learning_rate_is_warm_up_and_cosine():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    assert [learning_rate(step, config) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, config) == pytest.approx(0.55) and learning_rate(85, config) == pytest.approx(0.1 + 0.9 * (1 - 2**-0.5) / 2)
    assert learning_rate(110, config) == learning_rate(500, config) == pytest.approx(0.1)
    longer = TrainConfig(learning_rate=1.0, warmup_steps=1000, max_steps=10)
    assert learning_rate(9, longer) == pytest.approx(0.01)
    assert learning_rate(0, TrainConfig(learning_rate=1.0, warmup_steps=0, max_steps=0)) == 1.0


def test_wsd_is_constant_and_then_falls():
    config = TrainConfig(schedule="wsd", learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110, cooldown=0.2)
    rates = [learning_rate(step, config) for step in (4, 9, 10, 50, 88)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])
    assert learning_rate(99, config) == pytest.approx(0.1 + 0.9 / 2) and learning_rate(110, config) == pytest.approx(0.1)
    none = TrainConfig(schedule="wsd", learning_rate=1.0, max_steps=10, warmup_steps=0, cooldown=0)
    assert [learning_rate(step, none) for step in (0, 9)] == [1.0, 1.0]


def cosine(step):
    return 3e-3 * (step + 1) / 4 if step < 4 else 3e-3 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2


def wsd(step):
    return 3e-3 * (step + 1) / 4 if step < 4 else 3e-3 * min(1.0, (12 - step) / 6)


@pytest.mark.parametrize("schedule", [cosine, wsd])
def test_the_optimizers_get_the_rate_of_the_schedule(toy_run, monkeypatch, schedule):
    rates = {torch.optim.AdamW: [], torch.optim.Muon: []}
    for kind, seen in rates.items():
        def stepping(self, *args, seen=seen, step=kind.step, **kwargs):
            seen.append({group["lr"] for group in self.param_groups})
            return step(self, *args, **kwargs)
        monkeypatch.setattr(kind, "step", stepping)
    train.main([*toy_run, "--optimizer=muon", "--max_steps=12", "--cooldown=0.5", f"--schedule={schedule.__name__}"])
    for seen in rates.values():
        assert [len(rate) for rate in seen] == [1] * 12
        assert [min(rate) for rate in seen] == pytest.approx([schedule(step) for step in range(12)])


@pytest.mark.parametrize("grad_clip,scale", [(1.0, 1 / 5), (0.0, 1.0), (10.0, 1.0)])
def test_a_gradient_is_clipped_to_its_norm(grad_clip, scale):
    """By SGD, since Adam's steps are the same whatever the scale of the gradient."""
    layer = torch.nn.Linear(2, 1)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    gradient = dict(weight=torch.tensor([[3.0, 0.0]]), bias=torch.tensor([-4.0]))
    for name, p in layer.named_parameters():
        p.grad = gradient[name].clone()
    assert train.update(layer, [torch.optim.SGD(layer.parameters(), lr=1.0)], grad_clip) == 5.0
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - scale * gradient[name])
        assert p.grad is None


def test_a_run_clips_as_it_is_told(toy_run, monkeypatch):
    limits, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: limits.append(limit) or clip(p, limit))
    train.main([*toy_run, "--max_steps=2", "--grad_clip=0.01"])
    assert limits == [0.01, 0.01]


def test_products_have_the_dtype_of_the_run(toy_run, tmp_path, monkeypatch):
    """In training, in evaluation and in sample.py."""
    seen, attend = [], model.attend

    def attending(q, k, v, *args, **kwargs):
        seen.append(v.dtype)
        return attend(q, k, v, *args, **kwargs)
    monkeypatch.setattr(model, "attend", attending)
    for dtype in ("float32", "bfloat16"):
        for run in (lambda d=dtype: train.main([*toy_run, f"--dtype={d}", "--max_steps=1", "--overwrite=True"]),
                    lambda d=dtype: sample.main([f"--out_dir={tmp_path / 'run'}", "--device=cpu", f"--dtype={d}", "--max_new_tokens=2"])):
            run()
            assert len(seen) >= 4 and set(seen) == {getattr(torch, dtype)}
            seen.clear()


def test_a_step_is_one_mean_over_unequal_targets():
    """Micro-batches with 7, 1 and 0 targets give the gradient of one batch with 8."""
    config = GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=4, n_embd=32)
    ids = torch.randint(65, (3, 8), generator=torch.Generator().manual_seed(0)).numpy()
    targets = ids.copy()
    targets[0, 7:] = -1
    targets[1, 1:] = -1
    targets[2] = -1
    runtime, gradients, losses = pick_runtime("cpu", "float32", False), [], []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        model = GPT(config)
        batches = [MicroBatch(ids[part], targets[part], None) for part in parts]
        losses.append(train.backward(model, batches, runtime))
        gradients.append([p.grad for p in model.parameters()])
    plain = GPT(config)
    logits = plain(torch.from_numpy(ids))[0].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).flatten(), ignore_index=-1)
    expected.backward()
    for loss, grads in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, expected.detach())
        for grad, p in zip(grads, plain.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, atol=1e-6, rtol=1e-4)


def test_metrics_and_checkpoint(toy_run, tmp_path, capsys):
    train.main(toy_run)
    got = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in got] == [0, 5, 10, 15, 20]
    keys = {"step", "tokens", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_sec", "mfu", "skipped"}
    assert all(row.keys() >= keys for row in got)
    assert [row["step"] for row in got if row["val_loss"] is not None] == [0, 10, 20]
    assert got[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1) and got[-1]["val_loss"] < 4.5
    assert got[-1]["tokens"] == 20 * 256 and got[-1]["lr"] == pytest.approx(learning_rate(19, TrainConfig(max_steps=20, warmup_steps=4)))
    assert all(row["mfu"] is None for row in got) and all(row["tokens_per_sec"] > 0 for row in got[1:])
    val = Dataset(toy_run[0].partition("=")[2]).val
    assert got[-1]["val_bpb"] == pytest.approx(got[-1]["val_loss"] / math.log(2) * val.n_tokens / val.n_bytes)

    state = load(tmp_path / "run")
    assert (state["step"], state["tokenizer"], state["val_loss"]) == (20, "byte", got[-1]["val_loss"])
    assert state["config"]["n_embd"] == 32 and state["settings"]["max_steps"] == 20 and state["config"]["vocab_size"] == 257
    assert set(state["model"]) == set(model_of(state).state_dict())
    assert "sample.py --out_dir=" in capsys.readouterr().out.splitlines()[-1]


def test_loss_in_the_log_is_that_of_the_model(toy_run, tmp_path):
    """Validation recomputed by hand from the checkpoint, one window at a time."""
    train.main([*toy_run, "--eval_tokens=None"])
    state = load(tmp_path / "run")
    model, val = model_of(state).eval(), Dataset(toy_run[0].partition("=")[2]).val
    tokens = torch.from_numpy(val.windows([0], val.n_tokens)[0])
    total = 0.0
    with torch.inference_mode():
        for start in range(0, val.n_tokens - 1, 32):
            x, y = tokens[start:start + 32][:len(tokens) - 1 - start], tokens[start + 1:start + 33]
            total -= model(x[None])[0][0].double().log_softmax(-1).gather(1, y[:, None]).sum().item()
    assert state["val_loss"] == pytest.approx(total / (val.n_tokens - 1), abs=1e-5)


def test_the_seed_decides_the_weights_and_the_order(toy_run, tmp_path):
    """Each alone: a run whose weights ignored the seed still had another loss, by its order."""
    first = []
    for seed in (1, 2):
        train.main(out([*toy_run, "--max_steps=0", f"--seed={seed}"], tmp_path / str(seed)))
        state = load(tmp_path / str(seed))
        assert equal(state["model"], GPT(GPTConfig(**state["config"]), seed=seed).state_dict())
        config = TrainConfig(seed=seed, block_size=32, tokens_per_step=256)
        data = Dataset(toy_run[0].partition("=")[2])
        first.append(Batches(data, config, pick_runtime("cpu", "float32", False)).training(0)[0].x)
    assert (first[0] != first[1]).any()


def test_eval_only_of_another_runs_weights(toy_run, tmp_path, capsys):
    train.main(toy_run)
    capsys.readouterr()
    train.main([toy_run[0], f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'none'}",
                "--eval_only=True", "--eval_tokens=1024", "--device=cpu"])
    found = float(re.search(r"val_loss (\d+\.\d+)", capsys.readouterr().out)[1])
    assert found == pytest.approx(rows(tmp_path / "run")[-1]["val_loss"], abs=1e-4)
    assert not (tmp_path / "none").exists()


class StopAt(distributed.StopSignal):
    """A SIGTERM that comes at a known step boundary."""
    step = None

    def agreed(self, runtime):
        self.calls = getattr(self, "calls", -1) + 1
        if self.calls == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().agreed(runtime)


@pytest.mark.parametrize("changes", [[], ["--dropout=0.2", "--n_kv_head=1"], ["--optimizer=muon", "--tie_embeddings=False"],
                                     ["--trainable=q_proj|norm"], ["--attention=mla", "--n_kv_head=None", "--q_lora_rank=16"],
                                     ["--n_layer=6", "--window=8", "--global_every=2", "--kv_share=2", "--kv_tied=True", "--rope_fraction=0.5"]],
                         ids=["gqa", "mqa-dropout", "muon", "trainable", "mla", "cache"])
@pytest.mark.parametrize("stop", [7, 10])
def test_resume_is_bit_identical(toy_run, tmp_path, monkeypatch, capsys, stop, changes):
    whole, parts = out([*toy_run, *changes], tmp_path / "whole"), out([*toy_run, *changes], tmp_path / "parts")
    train.main(whole)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "StopSignal", StopAt)
        patch.setattr(StopAt, "step", stop)
        with pytest.raises(SystemExit) as exit:
            train.main(parts)
    assert exit.value.code == 128 + signal.SIGTERM and load(tmp_path / "parts")["step"] == stop
    assert f"stopped by SIGTERM after step {stop}" in capsys.readouterr().out
    with open(tmp_path / "parts/metrics.jsonl", "a") as f:  # as of a run that was killed after its last checkpoint
        f.write(json.dumps(dict(step=stop + 5)) + '\n{"step": 1')
    train.main([*parts, "--init_from=auto"])
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_older_checkpoints_number_the_moments(toy_run, tmp_path, optimizer):
    """Before moments had the names of their parameters: numbers, in the order of Muon's and AdamW's groups."""
    args = [*toy_run, f"--optimizer={optimizer}"]
    train.main(out([*args, "--keep_checkpoints=9"], tmp_path / "whole"))
    state = load(tmp_path / "whole/ckpt_10.pt")
    names = [name for name in state["model"] if "norm" not in name and "embed" not in name]
    rest = [name for name in state["model"] if name not in names]
    order = [*names, *rest] if optimizer == "muon" else [*rest[:1], *names, *rest[1:]]
    moments = {number: state["optimizer"]["state"][name] for number, name in enumerate(order)}
    older = dict(state, optimizer=dict(state=moments, param_groups=[]))
    for key in ("fast", "schedule", "cooldown"):
        del older["settings"][key]
    del older["best_val_loss"]
    (tmp_path / "parts").mkdir()
    torch.save(older, tmp_path / "parts/ckpt.pt")
    train.main(out([*args, "--init_from=resume"], tmp_path / "parts"))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.parametrize("changes", [[], ["--attention=mla", "--n_kv_head=None"]], ids=["gqa", "mla"])
def test_two_ranks_make_the_same_losses_and_resume_bit_for_bit(toy_run, tmp_path, changes):
    """One process with 4 micro-steps, 2 ranks with 2, and 2 ranks that are stopped by a SIGTERM and resumed."""
    args = [*toy_run, *changes, "--batch_size=2", "--max_steps=120", "--eval_interval=60", "--learning_rate=1e-3"]
    train.main(out(args, tmp_path / "one"))
    whole = torchrun(out(args, tmp_path / "whole"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = whole.communicate(timeout=100)[0]
    assert whole.returncode == 0, text
    assert text.count("step    120") == 1 and "2 ranks x 2 micro-steps" in text
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "whole"), strict=True):
        for key in ("train_loss", "val_loss"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=2e-4), a["step"]
    assert rows(tmp_path / "whole")[-1]["val_loss"] < 3.6
    if changes:
        return  # resuming does not depend on the kind of attention

    parts = torchrun([*out(args, tmp_path / "parts"), "--log_interval=1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    log = tmp_path / "parts/metrics.jsonl"
    while time.time() < deadline and not (log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > 6):
        time.sleep(0.01)
    try:
        parts.send_signal(signal.SIGTERM)  # torchrun passes it on to its workers
        parts.wait(timeout=60)
    finally:
        parts.kill()
    stopped = load(tmp_path / "parts")["step"]
    assert 0 < stopped < 120, stopped
    again = torchrun([*out(args, tmp_path / "parts"), "--init_from=resume", "--log_interval=1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = again.communicate(timeout=100)[0]
    assert again.returncode == 0 and f"resuming at step {stopped}" in text, text
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [row for row in rows(tmp_path / "parts") if row["step"] % 5 == 0] == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "parts")] == list(range(121))


def test_under_torchrun_one_rank_says_what_is_wrong(toy_run):
    run = torchrun([*toy_run, "--n_head=5"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = run.communicate(timeout=60)[0]
    assert run.returncode == 1 and text.count("train.py: n_kv_head=2 does not divide n_head=5") == 1
    assert text.count("Traceback") == 1, "torchrun's own report and no other"


def test_resume_prints_changes_and_takes_the_rest_from_the_checkpoint(toy_run, tmp_path, capsys):
    train.main([*toy_run, "--learning_rate=1e-3"])
    capsys.readouterr()
    train.main([f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_steps=25", "--batch_size=8"])
    text = capsys.readouterr().out
    assert "resuming at step 20, changed: max_steps 20 -> 25, batch_size 4 -> 8" in text
    assert rows(tmp_path / "run")[-1]["step"] == 25 and load(tmp_path / "run")["settings"]["learning_rate"] == 1e-3


def test_resume_may_name_what_the_run_has_and_trains_with_what_it_prints(toy_run, tmp_path, capsys):
    """The run's own values are no contradiction, even where they do not fit the defaults; new hyperparameters really act."""
    args = [*toy_run, "--n_head=6", "--n_kv_head=3", "--n_embd=24", "--head_dim=4", "--block_size=24", "--tokens_per_step=96"]
    train.main([*args, "--max_steps=4"])
    base = [f"--out_dir={tmp_path / 'run'}", "--init_from=resume"]
    for same in ("--n_kv_head=3", "--tokens_per_step=96", "--block_size=24"):
        train.main([*base, same])
    seen = []
    make = train.make_optimizers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizers", lambda *a: seen.append(make(*a)) or seen[0])
        train.main([*base, "--max_steps=5", "--weight_decay=0.7", "--beta1=0.8", "--beta2=0.5"])
    assert "weight_decay 0.1 -> 0.7" in capsys.readouterr().out
    assert seen[0][0].param_groups[0]["weight_decay"] == 0.7 and seen[0][0].param_groups[0]["betas"] == (0.8, 0.5)


def test_resume_writes_to_the_folder_it_is_called_with(toy_run, tmp_path):
    train.main(toy_run)
    (tmp_path / "run").rename(tmp_path / "moved")
    train.main([f"--out_dir={tmp_path / 'moved'}", "--init_from=resume", "--max_steps=22"])
    assert load(tmp_path / "moved")["step"] == 22 and not (tmp_path / "run").exists()


def test_odd_lines_in_metrics_are_dropped_at_resume(toy_run, tmp_path):
    train.main(toy_run)
    before = rows(tmp_path / "run")
    with open(tmp_path / "run/metrics.jsonl", "ab") as f:
        f.write(b'5\n{}\n[]\n"x"\n{"step": null}\n{"step": "3"}\n\xff\n')
    train.main([*toy_run, "--init_from=resume"])
    assert rows(tmp_path / "run") == before


def test_init_from_another_run_takes_its_weights_and_starts_at_step_0(toy_run, tmp_path, capsys):
    train.main(toy_run)
    before = weights(tmp_path / "run")
    data = toy_run[0]
    train.main([data, f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'tuned'}", "--max_steps=0", "--device=cpu",
                "--batch_size=4", "--tokens_per_step=256", "--eval_tokens=1024"])
    assert equal(before, weights(tmp_path / "tuned")) and load(tmp_path / "tuned")["step"] == 0
    assert rows(tmp_path / "tuned")[0]["val_loss"] == pytest.approx(rows(tmp_path / "run")[-1]["val_loss"], abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("pattern,moved", [("q_proj|k_proj", 4), ("^norm", 1), (r"layers\.1\..*mlp", 4)])
def test_only_what_is_trainable_moves(toy_run, tmp_path, capsys, pattern, moved, optimizer):
    train.main([*toy_run, f"--trainable={pattern}", "--max_steps=3", f"--optimizer={optimizer}"])
    state = load(tmp_path / "run")
    start = checkpoint.new_model(GPT, GPTConfig(**state["config"])).state_dict()
    changed = {name for name, x in state["model"].items() if not torch.equal(x, start[name])}
    assert changed == {name for name in start if re.search(pattern, name)} and len(changed) == moved
    with pytest.raises(SystemExit) as exit:
        train.main(out([*toy_run, "--trainable=no_such"], tmp_path / "none"))
    assert exit.value.code == 2 and "no parameter matches trainable='no_such'" in capsys.readouterr().err


def test_eval_only_prints_the_loss_of_the_log_and_writes_nothing(toy_run, tmp_path, capsys):
    train.main(toy_run)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    train.main([*toy_run, "--init_from=resume", "--eval_only=True"])
    assert f"val_loss {rows(tmp_path / 'run')[-1]['val_loss']:.4f}" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("eval_interval,lr,words", [
    (40, "1e30", "the 10th gradient in a row at step 21 is not finite (lr "), (1, "1e39", "validation loss at step 11 is not finite")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(toy_run, tmp_path, capsys, eval_interval, lr, words):
    train.main([*toy_run, "--max_steps=10", f"--eval_interval={eval_interval}"])
    good = weights(tmp_path / "run")
    with pytest.raises(SystemExit) as exit:
        train.main([*toy_run, "--init_from=resume", f"--learning_rate={lr}", "--max_steps=40", f"--eval_interval={eval_interval}"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and words in error and "float32" in error
    assert equal(good, weights(tmp_path / "run")) and load(tmp_path / "run")["step"] == 10


def poison(monkeypatch, steps):
    """Makes the gradient of these steps, counted from 0, infinite or not a number."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *args):
        parameters = list(parameters)
        if len(calls) in steps:
            parameters[0].grad.view(-1)[0] = math.inf if len(calls) % 2 else math.nan
        calls.append(1)
        return clip(parameters, *args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(toy_run, tmp_path, monkeypatch, capsys):
    """Such a step leaves weights and moments as they were: as if the optimizer had not been called."""
    args = [*toy_run, "--max_steps=12", "--eval_interval=4", "--log_interval=4", "--warmup_steps=0", "--learning_rate=1e-3"]
    with monkeypatch.context() as patch:
        poison(patch, {2, 5, 6})
        train.main(args)
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 1, 2, 0]
    assert "2 steps skipped (gradient not finite)" in capsys.readouterr().out
    steps = [int(x["step"]) for x in load(tmp_path / "run")["optimizer"]["state"].values()]
    assert set(steps) == {9} and all(json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    with monkeypatch.context() as patch:
        poison(patch, range(1, 10))  # nine in a row are endured
        train.main(out(args, tmp_path / "nine"))
    with monkeypatch.context() as patch:
        poison(patch, range(1, 11))
        with pytest.raises(SystemExit):
            train.main(out(args, tmp_path / "ten"))
    assert load(tmp_path / "ten")["step"] == 8, "good weights are saved while steps are skipped"


def test_a_run_whose_first_steps_were_all_skipped_resumes(toy_run, tmp_path, monkeypatch):
    """Its checkpoint has no moments yet, which was taken for those of another model."""
    with monkeypatch.context() as patch:
        poison(patch, range(4))
        train.main([*toy_run, "--max_steps=4", "--eval_interval=4"])
    state = load(tmp_path / "run")
    assert state["step"] == 4 and state["optimizer"] == {"state": {}}
    train.main([*toy_run, "--init_from=resume", "--max_steps=6"])
    steps = [int(x["step"]) for x in load(tmp_path / "run")["optimizer"]["state"].values()]
    assert set(steps) == {2}


def test_newest_best_and_kept_checkpoints(toy_run, tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.0, 3.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: dict(val_loss=next(losses), val_bpb=0.0))
    args = [*toy_run, "--eval_interval=4", "--keep_checkpoints=2"]
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "StopSignal", StopAt)
        patch.setattr(StopAt, "step", 13)
        with pytest.raises(SystemExit):
            train.main(args)
    assert load(tmp_path / "run/ckpt_best.pt")["step"] == 8
    train.main([*args, "--init_from=auto"])  # the best is known after a restart
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pt"))
    assert names == ["ckpt.pt", "ckpt_16.pt", "ckpt_20.pt", "ckpt_best.pt"]
    assert load(tmp_path / "run/ckpt_16.pt")["step"] == 16 and load(tmp_path / "run")["step"] == 20
    assert load(tmp_path / "run/ckpt_best.pt")["step"] == 20, "as good as the best, and newer"
    train.main([f"--init_from={tmp_path / 'run/ckpt_16.pt'}", toy_run[0], f"--out_dir={tmp_path / 'on'}", "--max_steps=0", "--tokens_per_step=256"])


@pytest.mark.parametrize("more,best", [([], 4), (["--eval_tokens=64"], 8)], ids=["same", "other"])
def test_losses_over_other_windows_are_not_compared(toy_run, tmp_path, monkeypatch, more, best):
    """A resumed run with another eval_tokens kept the best loss of before, and so perhaps a worse checkpoint for ever."""
    losses = iter([5.0, 1.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: dict(val_loss=next(losses), val_bpb=0.0))
    train.main([*toy_run, "--max_steps=4", "--eval_interval=4"])
    train.main([toy_run[0], f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_steps=8", *more])
    assert load(tmp_path / "run/ckpt_best.pt")["step"] == best


def test_writing_does_not_hold_up_training(toy_run, tmp_path, monkeypatch):
    """The first save returns while its file waits for the disk."""
    write, late, returned = torch.save, [], []
    first_returned = threading.Event()

    def slow_write(*args):
        if not first_returned.wait(timeout=20):
            late.append(args)
        write(*args)

    class Saver(saver.Saver):
        def save(self, *args):
            super().save(*args)
            returned.append(first_returned.is_set())
            first_returned.set()
    monkeypatch.setattr(torch, "save", slow_write)
    monkeypatch.setattr(saver, "Saver", Saver)
    train.main([*toy_run, "--max_steps=1", "--eval_interval=10"])
    assert not late and returned == [False, True]
    assert load(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_a_step_has_the_same_sequences_on_any_number_of_ranks(toy_data, batch_size):
    """With the same seeds of dropout, however the ranks cut their part into micro-steps."""
    config = TrainConfig(dropout=0.1, block_size=32, tokens_per_step=256, batch_size=batch_size)

    def step(ranks):
        found = []
        for rank in range(ranks):
            batches = Batches(Dataset(toy_data), config, SimpleNamespace(rank=rank, ranks=ranks))
            for batch in batches.training(5):
                found += zip(batch.x.tolist(), batch.y.tolist(), batch.seeds.tolist(), strict=True)
        return sorted(found)
    assert step(1) == step(2) == step(4) and len(step(1)) == 8
    assert len({seed for _, _, seed in step(1)}) == 8


def test_what_is_saved_is_the_state_of_that_step(toy_run, tmp_path, monkeypatch):
    """The thread writes a copy: training on changes nothing of it."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (time.sleep(0.3), save(*args)))
    args = [*toy_run, "--eval_interval=10", "--keep_checkpoints=9"]
    train.main(args)
    monkeypatch.undo()
    train.main(out([*args, "--max_steps=20", "--eval_interval=10"], tmp_path / "plain"))
    saved, plain = (load(tmp_path / name / "ckpt_10.pt") for name in ("run", "plain"))
    assert equal(saved["model"], plain["model"])
    for name, moments in plain["optimizer"]["state"].items():
        assert equal(saved["optimizer"]["state"][name], moments), name


def test_a_checkpoint_cannot_run_code(toy_run, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    train.main(toy_run)
    state = load(tmp_path / "run")
    torch.save(dict(state, step=Evil()), tmp_path / "run" / "ckpt.pt")
    with pytest.raises(SystemExit) as exit:
        train.main([*toy_run, "--init_from=resume"])
    assert exit.value.code == 2 and "damaged or not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_a_failed_save_leaves_the_checkpoint_whole(toy_run, tmp_path, monkeypatch, capsys):
    train.main(toy_run)
    good = (tmp_path / "run/ckpt.pt").read_bytes()

    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as exit:
        train.main([*toy_run, "--init_from=resume", "--max_steps=25"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "No space left on device): free 1 MiB; the previous checkpoint is whole: continue with" in error
    assert (tmp_path / "run/ckpt.pt").read_bytes() == good


def test_a_full_disk_in_the_middle_is_tried_again(toy_run, tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: files may have 20 kB at first, and any size later."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from nanogqa import checkpoint, distributed, saver
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
write, calls = saver.Saver.write, []
def counted(self, state):
    calls.append(state["step"])
    if len(calls) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write(self, state)
saver.Saver.write = counted
train.main(sys.argv[1:])
print("saved", calls)
"""
    done = subprocess.run([sys.executable, "-c", code, *toy_run, "--log_interval=2"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "saved [0, 2, 4, 10, 20]" in done.stdout and done.stderr.count("warning: cannot save step") == 2 and "free 1 MiB" in done.stderr
    assert load(tmp_path / "run")["step"] == 20 and not list((tmp_path / "run").glob("*.part"))


def test_compile_falls_back_to_eager_with_one_warning(toy_run, tmp_path, monkeypatch, capsys):
    def broken(model):
        def fail(*args, **kwargs):
            raise RuntimeError("no compiler here")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    train.main([*toy_run, "--compile=True"])
    printed = capsys.readouterr()
    assert printed.err.count("torch.compile does not work here (no compiler here)") == 1
    assert ", eager (torch.compile failed); 1 rank" in printed.out and "compiled" not in printed.out
    train.main(out([*toy_run, "--compile=False"], tmp_path / "eager"))
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "eager"))


def test_a_compiled_run_is_the_eager_run(toy_run, tmp_path, graphs):
    """With a compiler that works: also that compiling leaves no gradient, and saves under the plain names."""
    args = [*toy_run, "--log_interval=1", "--dropout=0.1"]
    train.main(out([*args, "--compile=True"], tmp_path / "compiled"))
    made = len(graphs)
    train.main(out([*args, "--compile=False"], tmp_path / "eager"))
    assert made and len(graphs) == made
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()
    for a, b in zip(rows(tmp_path / "compiled"), rows(tmp_path / "eager"), strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-5)


def test_wandb_receives_the_rows(toy_run, tmp_path, monkeypatch):
    logged = []

    class Run:
        id = "abc"

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, row):
            logged.append((row["step"], row))

        def finish(self):
            logged.append("finished")
    import wandb
    monkeypatch.setattr(wandb, "init", lambda **kwargs: logged.append(kwargs) or Run())
    train.main([*toy_run, "--wandb_log=True", "--wandb_project=p", "--wandb_run_name=r"])
    assert (logged[0]["project"], logged[0]["name"], logged[0]["config"]["n_embd"]) == ("p", "r", 32)
    assert [step for step, _ in logged[1:-1]] == [0, 5, 10, 15, 20] and logged[-1] == "finished"
    assert "val_loss" in logged[1][1] and "val_loss" not in logged[2][1]


def test_checkpoints_between_evaluations(toy_run, tmp_path, monkeypatch, capsys):
    """A run that is killed loses what follows its last checkpoint, and an evaluation may take long. The run that continues
    from one between evaluations ends with the same weights and rows."""
    steps = []
    save = saver.Saver.save
    monkeypatch.setattr(saver.Saver, "save", lambda self, state, last=False: steps.append(state["step"]) or save(self, state, last))
    args = [*toy_run, "--eval_interval=20", "--save_interval=8"]
    train.main(args)
    assert steps == [0, 8, 16, 20]
    assert [(row["step"], row["val_loss"] is not None) for row in rows(tmp_path / "run")] == [
        (0, True), (5, False), (8, False), (10, False), (15, False), (16, False), (20, True)]
    other = [*args, f"--out_dir={tmp_path / 'other'}"]
    monkeypatch.setattr(train, "backward", interrupted(train.backward, 18))
    with pytest.raises(SystemExit):
        train.main(other)
    monkeypatch.undo()
    train.main([*other, "--init_from=auto"])
    assert "resuming at step 16" in capsys.readouterr().out
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "other"))
    assert rows(tmp_path / "run") == rows(tmp_path / "other")


def interrupted(function, calls):
    """function, which raises KeyboardInterrupt when it is called more often than that."""
    left = [calls]

    def call(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args)
    return call


def test_wandb_that_does_not_start_is_a_sentence(toy_run, monkeypatch, capsys):
    import wandb

    def refuse(**kwargs):
        raise wandb.errors.UsageError("No API key configured.\nUse wandb login")
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SystemExit) as exit:
        train.main([*toy_run, "--wandb_log=True"])
    assert exit.value.code == 2 and "WANDB_MODE=offline" in capsys.readouterr().err


def test_a_run_that_wandb_refuses_leaves_what_it_was_to_replace(toy_run, tmp_path, monkeypatch):
    """Sharded checkpoints of the earlier run were deleted first."""
    import wandb

    def refuse(**kwargs):
        raise wandb.errors.UsageError("No API key configured.")
    monkeypatch.setattr(wandb, "init", refuse)
    train.main(toy_run)
    (tmp_path / "run/sharded_20").mkdir()
    (tmp_path / "run/sharded_20/state.json").write_text("{}")
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file())
    with pytest.raises(SystemExit):
        train.main([*toy_run, "--overwrite=True", "--wandb_log=True"])
    assert before == sorted((path, path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_weight_decay_is_on_matrices_only(toy_run):
    model = GPT(GPTConfig(vocab_size=65, n_embd=32, n_head=4, n_layer=1, qkv_bias=True))
    groups = groups_of(train.make_optimizers(model, TrainConfig(weight_decay=0.3)))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.dim() == 2 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(toy_run, tmp_path):
    model = GPT(GPTConfig(vocab_size=65, n_embd=32, n_head=4, n_layer=2, tie_embeddings=False, qkv_bias=True))
    optimizers = train.make_optimizers(model, TrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.3))
    assert [group["weight_decay"] for group in groups_of(optimizers)] == [0.3, 0.3, 0.0]
    muon, matrices, vectors = ({id(p) for p in group["params"]} for group in groups_of(optimizers))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i] for i in matrices} == {"embed.weight", "lm_head.weight"} and len(muon | matrices | vectors) == len(names)
    assert all("proj.weight" in names[i] for i in muon) and len(muon) == 14
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(65, (2, 16), generator=torch.Generator().manual_seed(0))
    model(ids, ids)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    update = (model.layers[0].mlp.up_proj.weight - before["layers.0.mlp.up_proj.weight"] * (1 - 1e-2 * 0.3)).detach()
    values = torch.linalg.svdvals(update)  # Muon's update is nearly orthogonal, and as large as AdamW's: 0.2 lr a number
    assert values.max() / values.median() < 2 and update.square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.3)



def test_an_optimizer_cannot_resume_the_run_of_another(toy_run, capsys):
    train.main([*toy_run, "--optimizer=muon", "--max_steps=2"])
    assert "the optimizer's state in the checkpoint does not fit the model" in fails(
        train.main, [*toy_run, "--init_from=resume", "--optimizer=adamw", "--max_steps=4"], capsys)


def test_a_run_that_was_stopped_at_its_new_last_step_is_evaluated(toy_run, tmp_path, monkeypatch):
    """It has no evaluation of that step, and --max_steps is lowered to it."""
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "StopSignal", StopAt)
        patch.setattr(StopAt, "step", 7)
        with pytest.raises(SystemExit):
            train.main(toy_run)
    assert load(tmp_path / "run")["val_loss"] is None
    train.main([*toy_run, "--init_from=resume", "--max_steps=7"])
    last = rows(tmp_path / "run")[-1]
    assert [row["step"] for row in rows(tmp_path / "run")].count(7) == 1
    assert (last["step"], load(tmp_path / "run")["val_loss"]) == (7, last["val_loss"]) and last["val_loss"] > 0


@pytest.mark.parametrize("more", [[], ["--eval_tokens=64"]], ids=["same", "other"])
def test_a_finished_run_is_evaluated_again_over_other_windows(toy_run, tmp_path, monkeypatch, capsys, more):
    """It printed the loss over the windows of before as that of its new eval_tokens."""
    losses = iter([5.0, 1.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: dict(val_loss=next(losses), val_bpb=0.0))
    train.main([*toy_run, "--max_steps=4", "--eval_interval=4"])
    train.main([toy_run[0], f"--out_dir={tmp_path / 'run'}", "--init_from=resume", *more])
    last = 2.0 if more else 1.0
    assert f"val_loss {last:.4f}" in capsys.readouterr().out.split("done in")[-1]
    assert load(tmp_path / "run")["val_loss"] == last == rows(tmp_path / "run")[-1]["val_loss"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 4]


def test_a_run_says_where_its_time_went_and_writes_a_trace(toy_run, tmp_path, capsys):
    train.main([*toy_run, "--profile=True"])
    times = re.search(r"^time: (.*)", capsys.readouterr().out, re.M)[1]
    shares = dict(re.findall(r"([a-z, ]+?) [\d.]+ s \((\d+)%\)(?:, )?", times))
    assert set(shares) == {"data", "forward and backward", "optimizer", "evaluation, log and checkpoints"}
    assert 97 <= sum(map(int, shares.values())) <= 103
    events = json.loads((tmp_path / "run/trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") and event.get("ph") == "X" for event in events) >= 5
    assert weights(tmp_path / "run")
    train.main(out(toy_run, tmp_path / "plain"))
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "run"))


def test_loss_falls_below_that_of_bigrams_on_the_embedded_data(tmp_path):
    """The Python standard library itself, prepared by train.py where it is not yet. Two layers learn in 200 steps to use more
    than the last byte."""
    train.main(["config/gqa.py", f"--out_dir={tmp_path}", "--device=cpu", "--n_layer=2", "--block_size=128", "--batch_size=16",
                "--tokens_per_step=2048", "--max_steps=200", "--eval_interval=200", "--eval_tokens=16384", "--warmup_steps=20",
                "--learning_rate=6e-3"])
    first, last = rows(tmp_path)[0], rows(tmp_path)[-1]
    assert first["val_loss"] == pytest.approx(math.log(257), abs=0.3)
    data = Dataset("python")
    tokens = data.train.windows([0], data.train.n_tokens)[0]
    val = data.val.windows(val_windows(data.val, 128, 16384), 129)
    counts = np.bincount(257 * tokens[:-1] + tokens[1:], minlength=257 * 257).reshape(257, 257) + 1.0
    shares = counts / counts.sum(1, keepdims=True)
    assert last["val_loss"] < -np.log(shares)[val[:, :-1], val[:, 1:]].mean()
