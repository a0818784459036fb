"""Times a float32 training step on this CPU with the faster operations, and with PyTorch's own.

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
import model
from train import TrainConfig, make_optimizer

STEPS = 60
BATCH_SIZE = 12
ONEDNN = model.ONEDNN
ON_CPU_IN_FLOAT32 = model.on_cpu_in_float32


def never(x):
    return False


def use_pytorch_operations():
    model.ONEDNN = False
    model.on_cpu_in_float32 = never


def use_faster_operations():
    model.ONEDNN = ONEDNN
    model.on_cpu_in_float32 = ON_CPU_IN_FLOAT32


def step_seconds(gpt, optimizer, ids):
    start = time.perf_counter()
    loss = gpt(ids, ids, logits="none")[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def summary(name, seconds):
    best = min(seconds) * 1e3
    median = statistics.median(seconds) * 1e3
    return f"{name:12} {best:6.1f} ms at best, {median:6.1f} ms in the median"


def main():
    config = TrainConfig(vocab_size=257, block_size=64)
    gpt = model.GPT(config)
    optimizer = make_optimizer(gpt, config)
    ids = torch.randint(256, (BATCH_SIZE, config.block_size))
    pytorch = []
    faster = []
    for _ in range(STEPS):
        use_pytorch_operations()
        pytorch.append(step_seconds(gpt, optimizer, ids))
        use_faster_operations()
        faster.append(step_seconds(gpt, optimizer, ids))
    print(summary("PyTorch's", pytorch))
    print(summary("faster", faster))


if __name__ == "__main__":
    main()
