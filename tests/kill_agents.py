"""Kills torchrun with SIGKILL at random moments of runs on 2 ranks, and waits for the ranks to end.

    python tests/kill_agents.py [--times=200] [--seed=0] [--patience=60]

The ranks are expected to save and to exit by themselves. Prints how many runs left a process that
was still alive after patience seconds. Linux only.
"""
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from kill_runs import children, start

from nanogqa.writer import write_dataset


def alive(pid):
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def one_run(folder, out_dir, rng, patience):
    """Kills the agent of a run and returns the ranks that do not end: a list of process ids."""
    process = start(folder, out_dir, "--max_steps=100000")
    while not (out_dir / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.5))
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.time() + patience
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.01)
    return [pid for pid in workers if alive(pid)]


def main(times=200, seed=0, patience=60):
    """(runs that left a rank behind, times)."""
    rng, folder, hung = random.Random(seed), Path(tempfile.mkdtemp()), 0
    write_dataset([("train", "the kill test needs some text, any will do. " * 400),
                   ("val", "and some more of it to validate. " * 60)], folder / "data", "byte")
    for i in range(times):
        out_dir = folder / f"run{i}"
        left = one_run(folder, out_dir, rng, patience)
        hung += bool(left)
        print(f"{i + 1:3d}: {f'still alive: {left}' if left else 'ended'}; {hung} hung", flush=True)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(out_dir, ignore_errors=True)
    print(f"{hung} of {times} runs left a rank that did not end")
    shutil.rmtree(folder)
    return hung, times


if __name__ == "__main__":
    given = dict(arg.removeprefix("--").split("=") for arg in sys.argv[1:])
    hung, _ = main(**{key: int(value) for key, value in given.items()})
    sys.exit(hung > 0)
