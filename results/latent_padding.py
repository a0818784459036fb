"""Times expanded latent attention with its values padded to the width of the keys, and unpadded.

    python results/latent_padding.py

model.py pads. This prints, for several shapes, how many times as long scaled_dot_product_attention
takes without padding, in the forward pass alone and with the gradient. Attention is causal and in
float32, keys are 3/2 as wide as values, and each time is the best of 20, measured in turns.
"""
import time

import torch
from torch.nn import functional as F

ROUNDS = 20
SHAPES = (  # batch, heads, tokens, width of a value
    (12, 4, 64, 32),
    (8, 4, 256, 32),
    (4, 12, 256, 64),
    (2, 12, 1024, 64),
)


def unpadded(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def padded(q, k, v):
    """The same result: zeros are appended to the values and cut off from the output."""
    width = v.size(-1)
    v = F.pad(v, (0, k.size(-1) - width))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :width]


def seconds(attention, inputs, gradient):
    start = time.perf_counter()
    y = attention(*inputs)
    if gradient:
        y.backward(torch.ones_like(y))
    return time.perf_counter() - start


def slowdown(shape, gradient):
    """Best time without padding divided by the best time with it."""
    batch, heads, tokens, width = shape
    q = torch.randn(batch, heads, tokens, 3 * width // 2, requires_grad=gradient)
    k = torch.randn(batch, heads, tokens, 3 * width // 2, requires_grad=gradient)
    v = torch.randn(batch, heads, tokens, width, requires_grad=gradient)
    with_padding = []
    without_padding = []
    for _ in range(ROUNDS):
        with_padding.append(seconds(padded, (q, k, v), gradient))
        without_padding.append(seconds(unpadded, (q, k, v), gradient))
    return min(without_padding) / min(with_padding)


def main():
    for shape in SHAPES:
        batch, heads, tokens, width = shape
        forward = slowdown(shape, gradient=False)
        backward = slowdown(shape, gradient=True)
        print(f"batch {batch}, {heads} heads of {width}, {tokens} tokens:  "
              f"forward {forward:.2f}  with gradient {backward:.2f}")


if __name__ == "__main__":
    main()
