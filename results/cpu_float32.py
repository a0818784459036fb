"""What the two float32 operations of model.py gain on this CPU: a training step with them and with torch's own, in turns.

    python results/cpu_float32.py

Prints the minimum and the median of 60 steps each (4 layers, 4 heads, width 128, context 64, batch 12, vocabulary 257).
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from train import TrainConfig, make_optimizer

config = TrainConfig(vocab_size=257, block_size=64)
gpt = model.GPT(config)
optimizer = make_optimizer(gpt, config)
ids = torch.randint(256, (12, 64))
onednn, on_cpu_in_float32 = model.ONEDNN, model.on_cpu_in_float32
ways = {"torch's own": (False, lambda x: False), "both": (onednn, on_cpu_in_float32)}
times = {way: [] for way in ways}
for _ in range(60):
    for way, (model.ONEDNN, model.on_cpu_in_float32) in ways.items():
        began = time.perf_counter()
        gpt(ids, ids, logits="none")[1].backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times[way].append(time.perf_counter() - began)
for way, seconds in times.items():
    print(f"{way:12} {min(seconds) * 1e3:6.1f} ms at best, {statistics.median(seconds) * 1e3:6.1f} ms in the median")
