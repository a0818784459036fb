"""Times ways to compute the attention of one new token over a large cache on a CPU.

    python results/decode_attention.py

model.py folds the queries that share a key/value head into one matrix and calls
scaled_dot_product_attention. Beside it: plain products, the context in parts that a log-sum-exp
merges, keys and values in bfloat16, and PyTorch's flex_attention, which needs a C++ compiler and
seconds to compile. All agree to 1e-4, in bfloat16 to 1e-2. Each time is the best of 10, in
milliseconds, measured in turns; reading is the time in which torch.dot reads as many bytes.
Writes results/decode_attention.md.
"""
import datetime
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanogqa.runtime import cpu_name

ROUNDS = 10
BATCH, HEADS, TOKENS, WIDTH = 16, 16, 4096, 64
PART = 1024  # tokens of a part of the context
RESULTS = Path(__file__).with_suffix(".md")

compiled_flex = torch.compile(flex_attention, dynamic=True)


def products(q, k, v):
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


def in_parts(q, k, v):
    """exp(lse) of a part is its share of the softmax's denominator (Milakov and Gimelshein 2018,
    arXiv 1805.02867)."""
    outs, sums = [], []
    for start in range(0, k.size(2), PART):
        part = slice(start, start + PART)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k[:, :, part], v[:, :, part])
        outs.append(out)
        sums.append(lse)
    share = torch.stack(sums).softmax(0)
    return (torch.stack(outs) * share[..., None]).sum(0)


def in_bfloat16(q, k, v):
    """k and v are bfloat16 already, as a cache would hold them."""
    return F.scaled_dot_product_attention(q.bfloat16(), k, v)


WAYS = {
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "products": products,
    "in parts": in_parts,
    "bfloat16": in_bfloat16,
    "flex_attention": compiled_flex,
}


def seconds(function, *inputs):
    start = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - start


def time_all(n_kv_head):
    """{way: best milliseconds} of one number of key/value heads."""
    q = torch.randn(BATCH, n_kv_head, HEADS // n_kv_head, WIDTH)
    k, v = torch.randn(2, BATCH, n_kv_head, TOKENS, WIDTH).unbind()
    inputs = dict.fromkeys(WAYS, (q, k, v))
    inputs["bfloat16"] = (q, k.bfloat16(), v.bfloat16())
    expected = products(q, k, v)
    for name, way in WAYS.items():
        tolerance = 1e-2 if name == "bfloat16" else 1e-4
        torch.testing.assert_close(
            way(*inputs[name]).float(), expected, atol=tolerance, rtol=tolerance)
    best = {"reading": min(seconds(torch.dot, k.flatten(), v.flatten()) for _ in range(ROUNDS))}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            best[name] = min(best.get(name, 1e9), seconds(way, *inputs[name]))
    return {name: value * 1e3 for name, value in best.items()}


@torch.inference_mode()
def main():
    lines = [
        "# Attention of one token over a large cache",
        "",
        f"Written by `python results/decode_attention.py`: milliseconds for a batch of {BATCH}, "
        f"{HEADS} heads of width {WIDTH} and {TOKENS:,} cached tokens in float32, one layer. "
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}.",
        "",
        "| key/value heads | " + " | ".join(["reading", *WAYS]) + " |",
        "|---" * (len(WAYS) + 2) + "|",
    ]
    for n_kv_head in (16, 4, 1):
        row = time_all(n_kv_head)
        lines.append(f"| {n_kv_head} | " + " | ".join(f"{row[name]:.1f}" for name in row) + " |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
