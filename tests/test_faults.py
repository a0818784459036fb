"""Faults and many processes: killed runs, a folder that is taken, restarts, several agents, any number of ranks."""
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time

import kill_runs
import pytest
import torch
from conftest import load, load_model
from test_inputs import fails
from test_train import ROOT, equal, out, rows, torchrun, weights

from nanogqa import files, resume
from nanogqa.configurator import UserError
import model
import train


def test_killed_runs_end_with_the_weights_of_a_whole_one():
    """A short version of python tests/kill_runs.py --times=50."""
    seed = random.randrange(10**6)
    print("python tests/kill_runs.py --times=3 --seed", seed)  # pytest shows it if the test fails
    assert kill_runs.main(times=3, seed=seed) == (3, 3)


def wait_for_step(folder, step, seconds=60):
    """Returns when the run in folder has logged that many steps, one a line."""
    deadline, log = time.time() + seconds, folder / "metrics.jsonl"
    while not log.exists() or log.read_text(encoding="utf-8").count("\n") <= step:
        assert time.time() < deadline, "the run does not begin"
        time.sleep(0.01)


@contextlib.contextmanager
def running(args):
    """The process of torchrun with two ranks, which end with it if the test fails."""
    process = torchrun(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()


def finish(process):
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    return text


def test_torchrun_restarts_a_killed_worker_by_itself(toy_run, tmp_path):
    args = [*toy_run, "--max_steps=60", "--log_interval=1", "--init_from=auto", "--eval_interval=7"]
    finish(torchrun(out(args, tmp_path / "whole"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3", "train.py"]
    process = subprocess.Popen([*command, *out(args, tmp_path / "parts")], cwd=ROOT, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_step(tmp_path / "parts", 10)
    os.kill(kill_runs.children(process.pid)[1], signal.SIGKILL)
    text = finish(process)
    assert "resuming at step" in text and equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_ranks_stop_together_after_a_signal_to_one(toy_run, tmp_path):
    """A rank that stops alone leaves the other one waiting, which then says that they lost each other."""
    args = [*toy_run, "--max_steps=100000", "--log_interval=1", "--eval_interval=50000"]
    with running(out(args, tmp_path / "run")) as process:
        wait_for_step(tmp_path / "run", 5)
        os.kill(kill_runs.children(process.pid)[1], signal.SIGTERM)
        text = process.communicate(timeout=100)[0]
    assert "stopped by SIGTERM" in text and "lost each other" not in text, text
    assert load(tmp_path / "run")["step"] >= 5


def test_workers_without_their_agent_save_and_end(toy_run, tmp_path):
    args = [*toy_run, "--max_steps=100000", "--log_interval=1", "--eval_interval=50000"]
    with running(out(args, tmp_path / "run")) as process:
        wait_for_step(tmp_path / "run", 5)
        process.send_signal(signal.SIGKILL)
        text = process.communicate(timeout=60)[0]  # returns when the workers have closed the pipe
    assert "stopped by SIGTERM" in text and load(tmp_path / "run")["step"] >= 5


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal")
def test_workers_that_still_start_end_with_their_agent(toy_run, tmp_path):
    with running(toy_run) as process:
        deadline, pause = time.time() + 60, random.uniform(1, 4)
        print("pause", pause)
        while len(kill_runs.children(process.pid)) < 2:
            assert time.time() < deadline, "the workers do not start"
            time.sleep(0.01)
        time.sleep(pause)  # while they import, meet or begin
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)  # at worst when a torchrun that does not answer is given up


def test_a_folder_belongs_to_one_run(toy_run, tmp_path, monkeypatch, capsys):
    train.main([*toy_run, "--max_steps=2"])
    monkeypatch.setattr(files.lock.__wrapped__, "__defaults__", (0.3, "out_dir"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with files.lock(tmp_path / "run", "another run"):
        for args in (["--init_from=resume"], ["--overwrite=True"], ["--init_from=auto", "--max_steps=4"]):
            assert "another run writes to" in fails(train.main, [*toy_run, *args], capsys)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    train.main([*toy_run, "--init_from=auto", "--max_steps=4"])


def test_a_wait_for_the_lock_is_announced(tmp_path, capsys):
    """Up to a minute passed without a word."""
    with files.lock(tmp_path, "first"), pytest.raises(UserError, match="second"), files.lock(tmp_path, "second", patience=3):
        pass
    assert f"{tmp_path} is in use: waiting for at most 3 s" in capsys.readouterr().err


def test_the_lock_ends_with_its_process(tmp_path):
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from nanogqa import files\nwith files.lock(sys.argv[1], ''): print('on', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.kill()
    with files.lock(tmp_path, "another run", patience=10):
        process.wait(timeout=60)


def test_any_number_of_ranks_has_the_same_loss_curve(toy_run, tmp_path):
    """The world-size law: 1, 2 and 4 ranks to 1e-5 over 50 steps of AdamW at 1e-3, with dropout; and two agents with one rank each."""
    args = [*toy_run, "--batch_size=None", "--dropout=0.1", "--max_steps=50", "--eval_interval=25", "--log_interval=1", "--learning_rate=1e-3"]
    train.main(out(args, tmp_path / "1"))
    for ranks in (2, 4):
        finish(torchrun(out(args, tmp_path / str(ranks)), ranks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--rdzv_backend=c10d",
         "--rdzv_id=a", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", "train.py", *out(args, tmp_path / "agents")], cwd=ROOT, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for node in (0, 1)]
    texts = [finish(agent) for agent in agents]
    assert sum("2 ranks" in text for text in texts) == 1, "one rank of all machines speaks"
    for other in ("2", "4", "agents"):
        for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / other), strict=True):
            for key in ("train_loss", "val_loss"):
                assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-5), (other, a["step"], key)
    assert torch.isfinite(weights(tmp_path / "4")["norm.weight"]).all()


FSDP = ["--parallel=fsdp", "--dropout=0.1", "--tokens_per_step=384", "--max_steps=50", "--eval_interval=25", "--log_interval=1", "--learning_rate=1e-3", "--seed=7", "--embed_std=0.1"]


def test_fsdp_has_the_losses_of_ddp_and_moves_between_numbers_of_ranks(toy_run, tmp_path):
    """50 steps on 2 ranks as DDP; as FSDP with recomputed blocks; and as FSDP that is stopped, and goes on on 3 ranks."""
    pytest.importorskip("safetensors")
    toy_run = [arg for arg in toy_run if not arg.startswith("--batch_size")]

    def run(name, ranks, *args, stop=None):
        process = torchrun(out([*toy_run, *FSDP, *args], tmp_path / name), ranks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if stop is None:
            return finish(process)
        wait_for_step(tmp_path / name, stop)
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=100)[0]
    run("ddp", 2, "--parallel=ddp")
    run("fsdp", 2, "--recompute=True")
    assert not list((tmp_path / "fsdp").glob("sharded_*")), "the ordinary checkpoint takes its place at the end"
    assert "and saved" in run("moved", 2, stop=5)
    (folder,) = (tmp_path / "moved").glob("sharded_*")
    files = sorted(path.name for path in folder.iterdir())
    assert len([name for name in files if name.endswith(".safetensors")]) == 2 and "state.json" in files and ".metadata" not in files
    (folder / ".metadata").write_bytes(evil(tmp_path))  # what torch's default storage would unpickle
    text = run("moved", 3, "--init_from=auto")
    assert "ranks 2 -> 3" in text and not (tmp_path / "owned").exists()
    for other in ("fsdp", "moved"):
        for a, b in zip(rows(tmp_path / "ddp"), rows(tmp_path / other), strict=True):
            for key in ("train_loss", "val_loss", "grad_norm"):
                assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-5), (other, a["step"], key)
        for name, x in weights(tmp_path / "ddp").items():
            torch.testing.assert_close(weights(tmp_path / other)[name], x, atol=2e-4, rtol=0)
    model, moments = load_model(tmp_path / "moved"), load(tmp_path / "moved")["optimizer"]["state"]
    assert len(moments) == len(list(model.parameters())) and all(int(x["step"]) == 50 for x in moments.values())
    run("moved", 2, "--init_from=resume", "--parallel=ddp", "--max_steps=52")  # and an ordinary run takes it over


def test_fsdp_passes_shared_keys_and_values_between_layers(toy_run, tmp_path):
    """With every setting of the cache at once, FSDP has the losses of DDP."""
    pytest.importorskip("safetensors")
    settings = ["--n_layer=6", "--n_kv_head=2", "--window=8", "--global_every=2", "--kv_share=2", "--kv_tied=True", "--rope_fraction=0.5"]
    toy_run = [arg for arg in toy_run if not arg.startswith("--batch_size")]
    args = [*toy_run, *FSDP, *settings, "--max_steps=12", "--eval_interval=6"]
    for name, more in (("ddp", "--parallel=ddp"), ("fsdp", "--recompute=False"), ("recompute", "--recompute=True")):
        finish(torchrun(out([*args, more], tmp_path / name), 2, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for a, b in (("ddp", "fsdp"), ("ddp", "recompute")):
        for one, other in zip(rows(tmp_path / a), rows(tmp_path / b), strict=True):
            for key in ("train_loss", "val_loss", "grad_norm"):
                assert one[key] == other[key] or one[key] == pytest.approx(other[key], abs=1e-5), (b, one["step"], key)


def evil(folder):
    """A pickle that runs a command when it is loaded without limits."""
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'owned'}",)
    return pickle.dumps(Evil())


@pytest.mark.parametrize("args,words", [(["--optimizer=muon"], "splits the matrices, but Muon needs whole ones"), ([], "start with torchrun")])
def test_what_fsdp_cannot_do(toy_run, capsys, args, words):
    assert words in fails(train.main, [*toy_run, "--parallel=fsdp", *args], capsys)


@pytest.mark.parametrize("val_loss,sharded,step", [(2.0, False, 21), (2.0, True, 20), (None, False, 20)])
def test_the_last_step_is_saved_again_where_something_is_missing(tmp_path, val_loss, sharded, step):
    """A run whose parts of ranks were saved at its new last step, with an evaluation, never wrote an ordinary ckpt.pt."""
    if sharded:
        (tmp_path / "sharded_20").mkdir()
        (tmp_path / "sharded_20/state.json").write_text("{}")
    config = train.TrainConfig(out_dir=str(tmp_path), init_from="resume", max_steps=20)
    state = dict(step=20, val_loss=val_loss, settings=dict(eval_tokens=config.eval_tokens))
    assert resume.first_new_step(config, state) == step
    config.max_steps = 30
    assert resume.first_new_step(config, state) == 21


def test_a_sharded_checkpoint_is_read_by_its_run_alone(toy_run, tmp_path, capsys):
    from test_inputs import sample
    train.main(toy_run)
    state = load(tmp_path / "run")
    folder = tmp_path / "run/sharded_20"
    folder.mkdir()
    import json
    (folder / "state.json").write_text(json.dumps({**state, "model": {}, "optimizer": {}}))
    assert "is sharded over ranks: finish its run with" in fails(sample.main, [f"--out_dir={tmp_path / 'run'}", "--device=cpu"], capsys)
    for args in ([], ["--parallel=fsdp"], ["--eval_only=True"]):
        error = fails(train.main, [*toy_run, f"--out_dir={tmp_path / 'other'}", f"--init_from={tmp_path / 'run'}", *args], capsys)
        assert "is sharded over ranks" in error and not (tmp_path / "other").exists(), "it took weights of out_dir"
    for text in ("{", "[]", '{"step": 1}'):
        (folder / "state.json").write_text(text)
        error = fails(train.main, [*toy_run, "--init_from=resume"], capsys)
        assert "state.json is damaged" in error or "is not a checkpoint" in error


@pytest.mark.parametrize("changes", [[], ["--attention=mla", "--n_kv_head=None"]], ids=["gqa", "mla"])
def test_recomputed_blocks_make_the_same_gradients(toy_run, tmp_path, monkeypatch, changes):
    calls, recomputing = [], model.checkpoint

    def checkpoint(*args, **kwargs):
        calls.append(1)
        return recomputing(*args, **kwargs)
    monkeypatch.setattr(model, "checkpoint", checkpoint)
    for name, args in (("plain", []), ("recomputed", ["--recompute=True"])):
        assert not calls
        train.main(out([*toy_run, "--dropout=0.1", *changes, *args], tmp_path / name))
    assert len(calls) == 2 * 2 * 20  # layers, micro-steps, steps
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "recomputed"), strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-6)


def test_ranks_that_find_different_checkpoints(toy_run, trained_at_0, tmp_path):
    """As on two machines without a shared disk: rank 0 resumes, here at step 0, and rank 1 finds no checkpoint."""
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import train\n"
            "train.main([*sys.argv[3:], '--out_dir=' + sys.argv[2] + os.environ['RANK'], '--init_from=auto'])")
    (tmp_path / "start.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "start.py"),
               str(ROOT), str(trained_at_0)[:-1], *[arg for arg in toy_run if "out_dir" not in arg]]
    done = subprocess.run(command, cwd=ROOT, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, timeout=120)
    assert done.returncode and "ranks find different checkpoints in" in done.stderr, done.stderr
    assert load(trained_at_0)["step"] == 0


@pytest.fixture
def trained_at_0(toy_run, tmp_path):
    """The folder of rank 0."""
    train.main(out([*toy_run, "--max_steps=0"], tmp_path / "rank0"))
    return tmp_path / "rank0"
