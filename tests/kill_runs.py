"""Kills runs on 2 ranks with SIGKILL at random moments and starts them again with the same command.

    python tests/kill_runs.py [--times=50] [--seed=0]

The victims are torchrun's agent, one of the workers, or all three; a third of the kills waits until a checkpoint is being
written. Prints how many of the runs ended with the weights, bit for bit, of one that was never killed. Linux only.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch
from conftest import load

from nanogqa.writer import write_dataset


def start(folder, out_dir, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", f"--dataset={folder / 'data'}",
         f"--out_dir={out_dir}", "--init_from=auto", "--device=cpu", "--n_layer=2", "--n_embd=32", "--n_kv_head=2", "--block_size=32",
         "--tokens_per_step=256", "--max_steps=120", "--eval_interval=3", "--eval_tokens=256", "--log_interval=1", "--dropout=0.1",
         "--keep_checkpoints=2", *more],
        cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    """The output of a run. Of an agent that was killed it ends when its workers have closed the pipe: TimeoutExpired if they hang."""
    return process.communicate(timeout=100)[0]


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def kill(process, out_dir, rng, began, lasts, in_write):
    """Waits for the moment, then kills; returns whether there was someone to kill, who it was, and the step of the log."""
    moment = began + rng.uniform(0.1, lasts)
    while time.time() < moment and process.poll() is None:
        time.sleep(0.001)
    while in_write and process.poll() is None and not (out_dir / "ckpt.pt.part").exists():
        pass
    who = rng.choice(["agent", "worker 0", "worker 1", "all"])
    agent, workers = [process.pid], children(process.pid)
    victims = {"agent": agent, "worker 0": workers[:1], "worker 1": workers[1:2], "all": agent + workers}[who]
    hit = process.poll() is None and bool(victims)
    for victim in victims if hit else []:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        step = json.loads((out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        step = "none"
    return hit, f"{who} at step {step}{', writing' if in_write else ''}"


def main(times=50, seed=0):
    """(runs whose weights are those of the whole run, times)."""
    rng, folder, good = random.Random(seed), Path(tempfile.mkdtemp()), 0
    write_dataset([("train", "the kill test needs some text, any will do. " * 400), ("val", "and some more of it to validate. " * 60)],
                  folder / "data", "byte")
    began = time.time()
    text = finish(start(folder, folder / "whole"))
    lasts, whole = time.time() - began, load(folder / "whole")
    assert whole["step"] == 120, text
    for i in range(times):
        out_dir = folder / f"run{i}"
        hit = False
        while not hit:  # a run may have ended before its moment, or not have begun
            shutil.rmtree(out_dir, ignore_errors=True)
            process = start(folder, out_dir)
            hit, what = kill(process, out_dir, rng, time.time(), lasts, in_write=i % 3 == 2)
            finish(process)
        text = finish(start(folder, out_dir))
        state = load(out_dir)
        same = state["step"] == 120 and all(torch.equal(x, whole["model"][name]) for name, x in state["model"].items())
        good += same
        resumed = next((line for line in text.splitlines() if line.startswith("resuming")), "from the start")
        print(f"{i + 1:3d}: killed {what}; {resumed}: {'the same weights' if same else 'OTHER WEIGHTS ' + text}", flush=True)
        shutil.rmtree(out_dir)
    print(f"{good} of {times} runs ended with the weights of a run that was not killed")
    shutil.rmtree(folder)
    return good, times


if __name__ == "__main__":
    given = dict(arg.removeprefix("--").split("=") for arg in sys.argv[1:])
    good, times = main(**{key: int(value) for key, value in given.items()})
    sys.exit(good != times)
