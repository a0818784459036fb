"""Measures what the differences between seeds are made of.

    python results/noise.py [--key=value ...]       settings of train.py, for a short trial

Trains MHA as results/compare does, but with the initial weights of one seed and the batches of
another: runs with the same weights differ by their batches alone, and runs with the same batches by
their weights alone. It also estimates the error that evaluating windows, not the whole text, adds
to a difference of two runs. Two runs train at a time, with one thread each. They go to out/noise;
finished ones are not repeated, and interrupted ones continue. Takes about 40 minutes on two CPU
cores. Writes results/noise.json. A trial is made anew in out/noise_trial, and only prints.
"""
import datetime
import itertools
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig
from nanogqa import checkpoint, folder
from nanogqa.configurator import UserError, parse, program
from nanogqa.dataloader import Dataset, val_batch, val_windows
from nanogqa.files import write_json
from nanogqa.runtime import describe_machine, pick_runtime
from train import TrainConfig

LIKE_COMPARE = ["--max_steps=800", "--eval_interval=100", "--device=cpu", "--dtype=float32"]
OF_EACH_RUN = ("out_dir", "seed", "init_from", "overwrite")  # settings that differ between runs
SEEDS = range(1, 7)
AT_A_TIME = 2  # runs


@dataclass
class Run:
    """A finished run."""
    val_loss: float
    window_losses: torch.Tensor  # (windows,) nats per token


# -- runs ------------------------------------------------------------------------------------------

def train(out_dir, flags):
    command = [sys.executable, ROOT / "train.py", f"--out_dir={out_dir}", *flags]
    print(out_dir.name, flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   env=dict(os.environ, OMP_NUM_THREADS="1"))


def initial_weights(seed, flags, runs_dir):
    """Makes a checkpoint with the weights of this seed before training, if it is not there."""
    out_dir = runs_dir / f"weights{seed}"
    if not folder.exists(out_dir):
        train(out_dir, [*flags, f"--seed={seed}", "--max_steps=0"])


def trained(weights_seed, batches_seed, flags, runs_dir):
    """The Run with the weights and the batches of these seeds, trained if it is not there."""
    out_dir = runs_dir / f"weights{weights_seed}-batches{batches_seed}"
    source = runs_dir / f"weights{weights_seed}"
    if folder.exists(out_dir):
        source = "resume"
    train(out_dir, [*flags, f"--seed={batches_seed}", f"--init_from={source}"])
    state = checkpoint.load(out_dir, GPTConfig)
    return Run(state["val_loss"], window_losses(state))


# -- validation windows ----------------------------------------------------------------------------

@torch.no_grad()
def window_losses(state):
    """The loss of a checkpoint on each of its validation windows."""
    config = GPTConfig(**state["config"])
    model = checkpoint.load_model(GPT, config, state).eval()
    val = Dataset(state["settings"]["dataset"]).val
    losses = []
    for start in val_windows(val, config.block_size, state["settings"]["eval_tokens"]):
        x, y = val_batch(val, [start], 1, config.block_size)
        losses.append(model(torch.tensor(x), torch.tensor(y), logits="none")[1])
    return torch.stack(losses)


def window_error(runs):
    """Standard error of the difference in loss of two runs that comes from evaluating windows, not
    the whole text: the root mean square over all pairs of runs."""
    squares = []
    for a, b in itertools.combinations(runs, 2):
        difference = a.window_losses - b.window_losses
        squares.append(float(difference.var()) / len(difference))
    return statistics.mean(squares) ** 0.5


# -- the study -------------------------------------------------------------------------------------

def measure(flags, runs_dir):
    """The content of results/noise.json."""
    first, *others = SEEDS
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(lambda seed: initial_weights(seed, flags, runs_dir), SEEDS))
        pairs = [(seed, first) for seed in SEEDS] + [(first, seed) for seed in others]
        runs = list(pool.map(lambda pair: trained(*pair, flags, runs_dir), pairs))
    same_batches, same_weights = runs[:len(SEEDS)], [runs[0], *runs[len(SEEDS):]]
    for run in runs:
        mean = run.window_losses.mean().item()
        assert abs(mean - run.val_loss) < 1e-4, "the windows are those of the run"
    return dict(
        command="python results/noise.py",
        date=datetime.date.today().isoformat(),
        machine=describe_machine(pick_runtime("cpu", "float32", False), ranks=1),
        weights_vary=[run.val_loss for run in same_batches],
        batches_vary=[run.val_loss for run in same_weights],
        windows=len(runs[0].window_losses),
        window_error=window_error(runs),
    )


@program
def main(argv):
    given = parse(TrainConfig, argv, __doc__)
    if set(given) & set(OF_EACH_RUN):
        raise UserError(f"{', '.join(OF_EACH_RUN)} differ between the runs: leave them out")
    flags = [*LIKE_COMPARE, *argv]
    runs_dir = ROOT / "out/noise"
    if argv:
        runs_dir = ROOT / "out/noise_trial"
        shutil.rmtree(runs_dir, ignore_errors=True)
    results = measure(flags, runs_dir)
    for name in ("weights_vary", "batches_vary"):
        print(name, f"{statistics.stdev(results[name]):.4f} nats, standard deviation")
    print("window_error", f"{results['window_error']:.4f} nats")
    if not argv:
        write_json(ROOT / "results/noise.json", results)


if __name__ == "__main__":
    main()
