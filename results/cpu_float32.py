"""Times a float32 training step on this CPU: the plain model, and nanogqa.fast.accelerate of it.

    python results/cpu_float32.py

Prints the minimum and the median of 60 steps of each, measured in turns (4 layers, 4 heads,
width 128, context 64, batch 12, vocabulary 257).
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT
from nanogqa.batches import MicroBatch
from nanogqa.fast import accelerate
from nanogqa.runtime import pick_runtime
from train import TrainConfig, backward, make_optimizers, update

STEPS = 60
BATCH_SIZE = 12


def step_seconds(gpt, optimizers, batches, runtime):
    start = time.perf_counter()
    backward(gpt, batches, runtime)
    update(gpt, optimizers, 1.0)
    return time.perf_counter() - start


def summary(name, seconds):
    best = min(seconds) * 1e3
    median = statistics.median(seconds) * 1e3
    return f"{name:12} {best:6.1f} ms at best, {median:6.1f} ms in the median"


def main():
    config = TrainConfig(vocab_size=257, block_size=64)
    plain = GPT(config)
    fast = accelerate(GPT(config))
    plain_optimizers = make_optimizers(plain, config)
    fast_optimizers = make_optimizers(fast, config)
    runtime = pick_runtime("cpu", "float32", False)
    ids = torch.randint(256, (BATCH_SIZE, config.block_size)).numpy()
    batches = [MicroBatch(ids, ids, seeds=None)]
    plain_seconds = []
    fast_seconds = []
    for _ in range(STEPS):
        plain_seconds.append(step_seconds(plain, plain_optimizers, batches, runtime))
        fast_seconds.append(step_seconds(fast, fast_optimizers, batches, runtime))
    print(summary("plain", plain_seconds))
    print(summary("fast", fast_seconds))


if __name__ == "__main__":
    main()
