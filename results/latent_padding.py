"""Expanded latent attention with values padded to the width of keys, as model.py does, and as they are.

    python results/latent_padding.py

Prints, for several lengths, how many times as long scaled_dot_product_attention takes without padding, forward and with the
gradient: causal, float32, keys of 3/2 the width of values, best of 20 in turns.
"""
import time

import torch
from torch.nn import functional as F


def seconds(q, k, v, padded, gradient):
    start = time.perf_counter()
    y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, k.size(-1) - v.size(-1))) if padded else v, is_causal=True)
    y = y[..., :v.size(-1)]
    if gradient:
        y.backward(torch.ones_like(y))
    return time.perf_counter() - start


for batch, heads, length, width in ((12, 4, 64, 32), (8, 4, 256, 32), (4, 12, 256, 64), (2, 12, 1024, 64)):
    print(f"batch {batch}, {heads} heads of {width}, {length} tokens:", end="")
    for gradient in (False, True):
        q, k, v = (torch.randn(batch, heads, length, w, requires_grad=gradient) for w in (3 * width // 2, 3 * width // 2, width))
        runs = [[seconds(q, k, v, padded, gradient) for padded in (True, False)] for _ in range(20)]
        padded, plain = map(min, zip(*runs))
        print(f"  {'with gradient' if gradient else 'forward'} {plain / padded:.2f}", end="")
    print()
