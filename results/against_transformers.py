"""Times decoding and training steps of this model beside transformers' Llama of the same shape.

    pip install transformers
    python results/against_transformers.py decode
    python results/against_transformers.py train

float32 on the CPU, random weights, no QK-norm. The two models are timed in turns. Prints the
minimum of each over the rounds, and the ratio, for every shape. Writes them to transformers.json,
where rows with a note stay: they are timed by hand, as results/README.md describes.
"""
import datetime
import json
import platform
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
from nanogqa.runtime import cpu_name, pick_runtime

RESULTS = Path(__file__).with_name("transformers.json")
ROUNDS = 2
WARMUP = 5  # training steps before the timed ones
SHARED = dict(device="cpu", dtype="float32", qk_norm=False)
DECODED = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, new_tokens=24, repeats=2)
DECODE = (
    dict(n_kv_head=12, batch_size=1, prompt_len=64),
    dict(n_kv_head=4, batch_size=1, prompt_len=64),
    dict(n_kv_head=1, batch_size=1, prompt_len=64),
    dict(n_kv_head=4, batch_size=8, prompt_len=64),
    dict(n_kv_head=12, batch_size=8, prompt_len=1024),
    dict(n_kv_head=4, batch_size=8, prompt_len=1024),
    dict(n_kv_head=1, batch_size=8, prompt_len=1024),
)
TRAIN = (
    dict(n_layer=4, n_head=4, n_embd=128, vocab_size=256, batch_size=12, block_size=64, steps=50),
    dict(n_layer=6, n_head=6, n_embd=384, vocab_size=256, batch_size=16, block_size=256, steps=8),
    dict(n_layer=4, n_head=4, n_embd=256, vocab_size=50304, batch_size=8, block_size=256, steps=8),
)


# -- transformers ----------------------------------------------------------------------------------

def llama(config):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_ff,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, tie_word_embeddings=True,
        max_position_embeddings=config.block_size, attn_implementation="sdpa"))


class Clock(transformers.StoppingCriteria):
    """Records when each token is generated, and never stops generation."""

    def __init__(self):
        self.ticks = []

    def __call__(self, input_ids, scores, **kwargs):
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.size(0), dtype=torch.bool)


def their_decode(config):
    """Seconds per token: median of a run, minimum of the runs."""
    model = llama(config).eval()
    idx = torch.randint(config.vocab_size - 1, (config.batch_size, config.prompt_len))
    medians = []
    for _ in range(config.repeats):
        clock = Clock()
        model.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=config.new_tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None,
            stopping_criteria=transformers.StoppingCriteriaList([clock]))
        medians.append(statistics.median(after - before for before, after in pairwise(clock.ticks)))
    return min(medians)


def their_train(config):
    """Seconds per step: median of the steps after the warm-up."""
    model = llama(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seconds = []
    for _ in range(WARMUP + config.steps):
        start = time.perf_counter()
        idx = torch.randint(config.vocab_size, (config.batch_size, config.block_size))
        model(input_ids=idx, labels=idx, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARMUP:])


# -- both in turns ---------------------------------------------------------------------------------

def compare_decode(config):
    """One round: milliseconds per token of transformers and of this model."""
    runtime = pick_runtime("cpu", "float32", False)
    theirs = their_decode(config) * 1e3
    return theirs, bench.decode(config, runtime, None)["step_ms"]


def compare_train(config):
    """One round: milliseconds per step of transformers and of this model."""
    runtime = pick_runtime("cpu", "float32", False)
    theirs = their_train(config) * 1e3
    return theirs, bench.train(config, runtime)["step_ms"]


def report(config, context, rounds):
    theirs, ours = map(min, zip(*rounds, strict=True))
    print(f"{config.mode} n_layer {config.n_layer} n_embd {config.n_embd} "
          f"vocab {config.vocab_size} n_kv_head {config.n_kv_head} batch {config.batch_size} "
          f"context {context}: transformers {theirs:.1f} ms, here {ours:.1f} ms, "
          f"ratio {ours / theirs:.2f}", flush=True)
    return dict(transformers_ms=round(theirs, 1), here_ms=round(ours, 1))


def decode_row(shape):
    config = bench.BenchConfig(mode="decode", **SHARED, **DECODED, **shape)
    rounds = [compare_decode(config) for _ in range(ROUNDS)]
    return dict(shape, **report(config, config.prompt_len, rounds))


def train_row(shape):
    config = bench.BenchConfig(mode="train", **SHARED, **shape)
    rounds = [compare_train(config) for _ in range(ROUNDS)]
    return dict(
        model=f"{config.n_layer} x {config.n_embd}", vocab_size=config.vocab_size,
        batch=f"{config.batch_size} x {config.block_size}", note="",
        **report(config, config.block_size, rounds))


def write(mode, rows):
    """Replaces the measurement of this mode in transformers.json."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    before = results[mode]
    noted = [row for row in before["rows"] if row.get("note")]
    results[mode] = dict(
        before, machine=f"{cpu_name()}, "
        f"{torch.get_num_threads()} threads", torch=torch.__version__,
        python=platform.python_version(), transformers=transformers.__version__,
        date=datetime.date.today().isoformat(), rows=rows + noted)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main(mode):
    if mode == "decode":
        rows = list(map(decode_row, DECODE))
    elif mode == "train":
        rows = list(map(train_row, TRAIN))
    else:
        sys.exit(f"unknown mode {mode!r}: choose decode or train")
    write(mode, rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python results/against_transformers.py decode|train")
    main(sys.argv[1])
