"""Decoding and training steps of this model and of transformers' Llama at the same shape, in turns on the same machine.

    pip install transformers
    python results/against_transformers.py decode
    python results/against_transformers.py train

float32, random weights, no QK-norm. Prints, for each shape, the minimum over the rounds of both, and their ratio.
"""
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import BenchConfig, decode, train
from train import pick_runtime

ROUNDS = 2
# n_layer, n_head, n_kv_head, n_embd, vocab_size, batch_size, and for decode prompt_len, for train block_size
DECODE = [(12, 12, kv, 768, 50304, 1, 64) for kv in (12, 4, 1)] + [(12, 12, 4, 768, 50304, 8, 64)] + [
          (12, 12, kv, 768, 50304, 8, 1024) for kv in (12, 4, 1)]
TRAIN = [(4, 4, 4, 128, 256, 12, 64), (6, 6, 6, 384, 256, 16, 256), (4, 4, 4, 256, 50304, 8, 256)]


def llama(c):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, tie_word_embeddings=True,
        max_position_embeddings=c.block_size, attn_implementation="sdpa"))


class Clock(transformers.StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self):
        self.ticks = []

    def __call__(self, input_ids, scores, **kwargs):
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.size(0), dtype=torch.bool)


def their_decode(c):
    model, steps = llama(c).eval(), []
    idx = torch.randint(c.vocab_size - 1, (c.batch_size, c.prompt_len))
    for _ in range(2):
        clock = Clock()
        model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=c.new_tokens, do_sample=False, pad_token_id=0,
                       eos_token_id=None, stopping_criteria=transformers.StoppingCriteriaList([clock]))
        steps.append(statistics.median(b - a for a, b in zip(clock.ticks, clock.ticks[1:])))
    return min(steps) * 1e3


def their_train(c):
    model, seconds = llama(c), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(5 + c.steps):
        began = time.perf_counter()
        idx = torch.randint(c.vocab_size, (c.batch_size, c.block_size))
        model(input_ids=idx, labels=idx, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[5:]) * 1e3


mode = sys.argv[1]
for shape in dict(decode=DECODE, train=TRAIN)[mode]:
    config = BenchConfig(mode=mode, device="cpu", dtype="float32", qk_norm=False, new_tokens=24, repeats=2,
                         steps=50 if shape[4] < 1000 and shape[3] < 300 else 8,
                         **dict(zip(("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "batch_size"), shape)),
                         **{"prompt_len" if mode == "decode" else "block_size": shape[6]})
    runtime, ours, theirs = pick_runtime("cpu", "float32", False), [], []
    for _ in range(ROUNDS):
        theirs.append((their_decode if mode == "decode" else their_train)(config))
        row = decode(replace(config), runtime, None) if mode == "decode" else train(config, runtime)
        ours.append(row["step_ms"])
    print(f"{mode} n_layer {shape[0]} n_embd {shape[3]} vocab {shape[4]} n_kv_head {shape[2]} batch {shape[5]} context {shape[6]}: "
          f"transformers {min(theirs):.1f} ms, here {min(ours):.1f} ms, ratio {min(ours) / min(theirs):.2f}", flush=True)
