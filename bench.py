"""Times decoding or training of one shape, or of every combination of the values that --key=1,2,4 lists.

    python bench.py --mode=decode --n_layer=12 --n_head=12 --n_kv_head=12,4,1 --n_embd=768 --vocab_size=50304 --batch_size=1,8
    python bench.py --mode=train --batch_size=12 --block_size=64
    python bench.py --mode=scale > docs/scale.md    what the sizes of config/ would take on many GPUs: calculated

Prints a line for each and ends with one JSON object, {"rows": [...]} of them where there are several.
"""
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from nanogqa import checkpoint
from nanogqa.configurator import UserError, build, combinations, parse, program, subset
from model import LATENT, GPT, GPTConfig, KVCache
from sample import compile_for_decoding, decoding_bytes, prefill, prefill_chunk, prepare_for_decoding
from train import PEAK_FLOPS, TrainConfig, compile_model, keep_freed_memory, make_optimizer, peak_flops, pick_runtime

# peak memory bandwidth in bytes/s by a part of the device's name (NVIDIA's data sheets)
PEAK_BANDWIDTH = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.04e12, "A100": 1.56e12}


@dataclass
class BenchConfig(GPTConfig):
    mode: Literal["decode", "train", "scale"] = "decode"  # tokens from a cache, training steps, or docs/scale.md
    out_dir: str | None = None    # decode the checkpoint in this folder; None: random weights of the shape given
    batch_size: int = 1           # rows
    prompt_len: int = 64          # decode: tokens in the cache before the first step
    prefill: bool = True          # decode: read a prompt; False fills the cache with random values instead
    new_tokens: int = 32          # decode: steps of a run
    steps: int = 50               # train: steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # train: as in train.py
    repeats: int = 3              # decode: runs
    seed: int = 1337              # of weights and tokens
    device: str = "auto"          # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # as in sample.py for decode, as in train.py for train
    compile: Literal["auto", True, False] = "auto"  # as in sample.py for decode, as in train.py for train

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "prompt_len", "new_tokens", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.vocab_size is None:
            self.vocab_size = 257
        if self.mode == "decode":  # the context is as long as asked for, and no longer
            self.block_size = self.prompt_len + self.new_tokens


def choices_of(given):
    """combinations(given), each once; where both kinds of attention are listed, without the settings of the other kind."""
    chosen = combinations(given)
    if isinstance(given.get("attention"), list):
        chosen = [{key: value for key, value in values.items()
                   if key not in (LATENT if values["attention"] == "gqa" else ("n_kv_head", "qkv_bias"))} for values in chosen]
    return [values for i, values in enumerate(chosen) if values not in chosen[:i]]


def heads_of(config):
    """What sets the kinds of attention apart, for a row of results."""
    return dict(attention=config.attention, n_kv_head=None if config.attention == "mla" else config.n_kv_head,
                **{name: getattr(config, name) for name in LATENT})


def load_model(out_dir):
    state = checkpoint.load(out_dir, GPTConfig)
    return checkpoint.load_model(GPT, GPTConfig(**state["config"]), state)


def clock(runtime):
    """Seconds, once the device has done what it was given."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(runtime):
    """Bytes per second that this machine reads: known of a GPU, measured of a CPU, None where neither."""
    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name(runtime.device)
        return next((peak for part, peak in PEAK_BANDWIDTH.items() if part in name), None)
    if runtime.device.type != "cpu":
        return None
    a, b = torch.ones(2, 2**26).unbind()  # 256 MiB each
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        torch.dot(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * a.nbytes / min(seconds)


def peak_memory(runtime, reset=False):
    """Bytes held at most since the last reset: of a GPU what was allocated, else what was resident beyond the imports."""
    if runtime.device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset and os.path.exists("/proc/self/clear_refs"):  # Linux; elsewhere the peak is that of the process so far
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what the row before it left behind; glibc has it
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    return resident_peak() - AFTER_IMPORTS


def resident_peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


AFTER_IMPORTS = resident_peak()


@torch.inference_mode()
def decode(config, runtime, peak):
    """One row of results: a prompt is read once, then runs of new_tokens greedy steps continue it."""
    peak_memory(runtime, reset=True)
    if config.out_dir is not None:
        model = load_model(config.out_dir)
        model.config.block_size = config.block_size
    else:
        model = checkpoint.new_model(GPT, subset(GPTConfig, config), config.seed)
    shape, B = model.config, config.batch_size
    kv_bytes = model.kv_bytes_per_token(runtime.dtype)
    head = model.head_weight
    read = (model.num_params() - (0 if head is model.embed.weight else model.embed.weight.numel())) * runtime.dtype.itemsize
    del head  # prepare_for_decoding frees it
    model = prepare_for_decoding(model.to(runtime.device, runtime.dtype).eval(), B)
    began = clock(runtime)
    forward = compile_for_decoding(model, runtime) if runtime.compile else model
    cache = KVCache(shape, B, config.block_size, runtime.device, runtime.dtype, static=runtime.compile)
    idx = torch.randint(shape.vocab_size, (B, config.prompt_len), generator=torch.Generator().manual_seed(config.seed))
    idx, prefill_s = idx.to(runtime.device), None
    for attempt in range(2 if config.prefill else 0):  # the first warms up
        cache.rewind(0)
        start = clock(runtime)
        token = prefill(forward, idx, cache, prefill_chunk(shape, B))[:, -1].argmax(-1, keepdim=True)
        prefill_s = clock(runtime) - start
    if not config.prefill:
        for x in (*cache.k, *cache.v):
            x.normal_()
        token = idx[:, :1]
    runs = []
    for run in range(1 + config.repeats):
        cache.rewind(config.prompt_len)
        new, seconds = token, []
        for _ in range(config.new_tokens if run else min(4, config.new_tokens)):  # the first warms up
            start = clock(runtime)
            new = forward(new, cache=cache, logits="last")[0][:, -1].argmax(-1, keepdim=True)
            seconds.append(clock(runtime) - start)
        runs.append((statistics.median(seconds), clock(runtime)))
    step = min(seconds for seconds, _ in runs[1:])
    bytes_per_step = read + B * kv_bytes * (config.prompt_len + config.new_tokens // 2)
    bound = decoding_bytes(shape, B, config.prompt_len if config.prefill else 1, config.block_size, runtime,
                           static=runtime.compile)
    return dict(mode="decode", n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, **heads_of(shape),
                batch_size=B, prompt_len=config.prompt_len, new_tokens=config.new_tokens,
                warmup_s=runs[0][1] - began, prefill_s=prefill_s, step_ms=step * 1e3, decode_tok_s=B / step,
                kv_cache_bytes=cache.nbytes, bytes_per_step=bytes_per_step, bandwidth_gb_s=bytes_per_step / step / 1e9,
                mbu=bytes_per_step / step / peak if peak else None,
                peak_memory_bytes=peak_memory(runtime), memory_bound_bytes=sum(bound.values()))


def train(config, runtime):
    """One row of results: batch, forward, backward, clip and optimizer, on random tokens."""
    keep_freed_memory()
    peak_memory(runtime, reset=True)
    model = checkpoint.new_model(GPT, subset(GPTConfig, config), config.seed).to(runtime.device)
    optimizer = make_optimizer(model, TrainConfig(optimizer=config.optimizer))
    B, T = config.batch_size, config.block_size

    def loss_of(forward):
        x, y = torch.randint(config.vocab_size, (2, B, T)).to(runtime.device).unbind()
        with runtime.autocast():
            return forward(x, y, logits="none")[1]
    began = clock(runtime)
    forward = compile_model(model, runtime, lambda f: loss_of(f).backward())
    seconds = []
    for step in range(5 + config.steps):  # five warm up
        if step == 5:
            warmup_s = clock(runtime) - began
        start = clock(runtime)
        loss_of(forward).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(clock(runtime) - start)
    step, flops = statistics.median(seconds[5:]), peak_flops(runtime)
    return dict(mode="train", n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, **heads_of(config),
                batch_size=B, block_size=T, warmup_s=warmup_s, step_ms=step * 1e3,
                tok_s=B * T / step, mfu=B * T * model.flops_per_token(T) / step / flops if flops else None,
                peak_memory_bytes=peak_memory(runtime))


# -- --mode=scale: what larger runs would take, calculated ---------------------------------------------------------------

SIZES = "gpt2_124m", "gpt2_350m", "gpt2_1.5b", "llama_1b", "llama_8b"  # of config/
GPU_MEMORY = {"H100": 80e9, "H200": 141e9}  # bytes (NVIDIA's data sheets)
NODE, NVLINK, NETWORK = 8, 450e9, 50e9  # GPUs of a node; bytes/s one way of each inside it and out of it (400 Gb/s)
ASSUMED_MFU, USABLE = 0.4, 0.9  # of the peak FLOP/s while computing, of the memory


def size_of(name):
    """(TrainConfig of config/NAME.py, its GPT without weights)."""
    config = build(TrainConfig, parse(TrainConfig, [str(Path(__file__).parent / "config" / f"{name}.py")], ""))
    with torch.device("meta"):
        return config, GPT(subset(GPTConfig, config))


def state_bytes(model, gpus, sharded):
    """Bytes on each GPU that do not grow with the batch: see "Memory" in SCALE."""
    total, blocks = model.num_params(), model.num_params(embedding=False)
    if not sharded or gpus == 1:
        return 18 * total
    return 16 * total / gpus + 6 * (total - blocks + 2 * blocks / model.config.n_layer)


def activation_bytes(c, tokens, recompute=False):
    """Bytes that backward needs of that many tokens on one GPU: see "Activations" in SCALE."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    block = 18 * c.n_embd + 4 * (q + kv) + 8 * c.n_ff + 4 * c.n_head + (4 * (q + kv) if c.qk_norm else 0)
    kept = 4 * c.n_embd * c.n_layer + block if recompute else block * c.n_layer
    return tokens * (kept + 12 * c.n_embd) + 10 * c.vocab_size * min(tokens, 2**28 // c.vocab_size)


def sent_bytes(params, gpus, sharded, micro_steps=1):
    """Bytes that each GPU sends in a step: see "Communication" in SCALE."""
    return params * (gpus - 1) / gpus * (8 * micro_steps if sharded else 2 * 4)


def scale(config, model, gpus, sharded):
    """What a step takes of each GPU: memory without and with recomputing, bytes sent, seconds of either; and its tokens."""
    share = max(1, config.tokens_per_step // config.block_size // gpus)  # sequences
    batch = min(config.batch_size, share)
    state, tokens = state_bytes(model, gpus, sharded), share * config.block_size
    sent = sent_bytes(model.num_params(), gpus, sharded, share // batch)
    return dict(memory=state + activation_bytes(config, batch * config.block_size), sent=sent, tokens=tokens * gpus,
                recomputing=state + activation_bytes(config, batch * config.block_size, recompute=True),
                compute_s=tokens * model.flops_per_token() / PEAK_FLOPS["H100"] / ASSUMED_MFU,
                communication_s=sent / (NVLINK if gpus <= NODE else min(NVLINK, NODE * NETWORK)))


def speed(row, memory):
    """Tokens per second of all GPUs with that much memory, at worst and at best, in words."""
    if min(row["memory"], row["recomputing"]) > USABLE * memory:
        return "does not fit"
    recompute = row["memory"] > USABLE * memory
    compute, communication = row["compute_s"] * (4 / 3 if recompute else 1), row["communication_s"]
    rates = (row["tokens"] / seconds for seconds in (compute + communication, max(compute, communication)))
    worst, best = (f"{float(f'{rate:.3g}'):,.0f}" for rate in rates)
    return (worst if worst == best else f"{worst} to {best}") + (", recomputing" if recompute else "")


def scale_document():
    """docs/scale.md."""
    sizes = {name: size_of(name) for name in SIZES}
    overview, tables = [], []
    for name, (config, model) in sizes.items():
        ddp, fsdp = scale(config, model, 8, False), scale(config, model, 8, True)
        steps, hours = config.max_steps, config.max_steps * ddp["compute_s"] * 8 / 3600
        overview.append(f"| [{name}](../config/{name}.py) | {model.num_params():,} | {model.flops_per_token() / 1e9:.2f} | "
                        f"{steps * config.tokens_per_step / 1e9:.1f} | {hours:,.0f} | " + " | ".join(
                            f"{row[key] / 1e9:.1f}" for row in (ddp, fsdp) for key in ("memory", "recomputing")) + " |")
    for name in ("gpt2_124m", "gpt2_1.5b", "llama_8b"):
        tables.append(f"\n### {name}\n\n| {' | '.join(STEP_COLUMNS)} |\n{'|---' * len(STEP_COLUMNS)}|")
        for gpus, sharded in ((1, False), (8, False), (8, True), (64, False), (64, True), (1024, False), (1024, True)):
            row = scale(*sizes[name], gpus, sharded)
            cells = (f"{gpus:,}", "one GPU" if gpus == 1 else "FSDP" if sharded else "DDP", f"{row['tokens']:,}",
                     *(f"{row[key] / 1e9:.1f}" for key in ("memory", "recomputing", "sent")), f"{row['compute_s']:.3f}",
                     f"{row['communication_s']:.3f}", *(speed(row, memory) for memory in GPU_MEMORY.values()))
            tables.append(f"| {' | '.join(cells)} |")
    return SCALE.format(overview="\n".join(overview), tables="\n".join(tables))


STEP_COLUMNS = ("GPUs", "", "tokens per step", "memory, GB", "recomputing, GB", "sent, GB", "computing, s", "sending, s",
                "tokens/s, H100", "tokens/s, H200")
SCALE = """# What larger runs would take

Printed by `python bench.py --mode=scale`: calculated from the parameters and FLOPs that model.py counts and from data sheets.
Nothing here was run. DDP and FSDP are train.py's `--parallel=ddp` and `--parallel=fsdp`, recomputing (activation checkpointing) is
its `--recompute=True`.

## Sizes

Memory is that of each of 8 GPUs. GPU-hours are of computing alone, the best that the assumptions allow. 1 GB is 10^9 bytes.

| config | parameters | GFLOPs per token | tokens, billions | GPU-hours | DDP, GB | recomputing | FSDP, GB | recomputing |
|---|---|---|---|---|---|---|---|---|
{overview}

## Steps

Memory, bytes sent and seconds are those of each GPU in one optimizer step, seconds without recomputing. Tokens/s are those of
all GPUs, at worst and at best, with recomputing where only that fits.
{tables}

## Assumptions

- *GPUs*: 989 TFLOP/s in dense bfloat16 on H100 and H200 (SXM), with 80 and 141 GB. A run fits where it needs at most 90 % of
  the memory: the rest is for CUDA itself, the allocator's gaps and passing buffers, which are not counted.
- *Computing*: at a model FLOPs utilisation (MFU) of 0.4, whatever a GPU's share of the batch; small shares will not reach it.
  FLOPs per token are `flops_per_token` of model.py: 6 per weight of a product and 12 L H D T for attention. Recomputing adds a
  forward, a third. Data, the optimizer's own time, evaluation and checkpoints are left out.
- *Batch*: tokens_per_step and batch_size of the config, batch_size at most a GPU's share. Where there are more GPUs than
  sequences each takes one, which makes a larger batch than the config's.
- *Memory*: float32 weights and gradients and AdamW's two moments are 16 bytes a parameter (ZeRO, arXiv 1910.02054). One GPU and
  DDP hold all of them, and 2 bytes of autocast's bfloat16 copies. FSDP holds its share of the 16 and, gathered, 6 bytes
  (bfloat16 weight, float32 gradient) for each parameter of the tables and of two blocks.
- *Activations*: what eager autograd keeps of a token under bfloat16 autocast with flash attention: in each block 18 C +
  4 (H + K) D + 8 F + 4 H bytes, and 4 (H + K) D more with qk_norm (C n_embd, F n_ff, H and K heads of width D). These are the
  float32 inputs of two norms and a bfloat16 copy of their outputs for each of five projections; q, k, v, the attention's output
  and its log-sums; and four of the MLP. Outside of the blocks 12 C, and in the loss head 10 bytes for each of at most 2^28
  logits. Recomputing keeps 4 C of each block and all of one. torch.compile keeps fewer.
- *Communication*: DDP's ring all-reduce of float32 gradients sends 2 (n - 1) / n times 4 bytes a parameter, once a step. FSDP
  gathers bfloat16 weights twice and reduce-scatters float32 gradients in every micro-step, (n - 1) / n times 8 bytes.
- *Links*: up to 8 GPUs NVLink at 450 GB/s one way. Beyond, each GPU has 50 GB/s (400 Gb/s) out of its node of 8; rings are laid
  so that each crosses a node's border once and eight of them share its links, 400 GB/s. A single ring has 50 GB/s, and takes
  eight times as long. Latency, which counts with small models on many GPUs, and congestion are left out.
- *Overlap*: at best sending hides behind computing, max(computing, sending); at worst it waits, computing + sending.

## Checked against measurement

Speed, memory and communication: not measured on a GPU (no GPU was at hand). The tests compare the activations of a block with
what autograd keeps on a CPU, and the parameters with the published counts.
"""


@program
def main(argv):
    given = parse(BenchConfig, argv, __doc__, axes=True)
    configs, rows, peak = [build(BenchConfig, values) for values in choices_of(given)], [], None
    if any(config.mode == "scale" for config in configs):
        if len(given) > 1 or len(configs) > 1:
            raise UserError("--mode=scale takes its shapes from config/ and no other setting: leave the rest out")
        print(scale_document(), end="")
        return
    shape = [f.name for f in fields(GPTConfig) if f.name in given]
    for config in configs:
        if config.out_dir is not None and config.mode == "train":
            raise UserError("out_dir is for --mode=decode: train.py itself reports the speed of a run")
        if config.out_dir is not None and shape:
            raise UserError(f"{', '.join(shape)} and out_dir exclude each other: a checkpoint has its own shape, leave one out")
    for config in configs:
        runtime = pick_runtime(config.device, config.dtype, config.compile, config.new_tokens if config.mode == "decode" else None)
        if config.mode == "decode" and peak is None:
            peak = bandwidth(runtime)
        row = decode(config, runtime, peak) if config.mode == "decode" else train(config, runtime)
        row |= dict({key: runtime.describe()[key] for key in ("device", "dtype", "compile")}, torch=torch.__version__)
        rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
        shown = ("prompt_len", "prefill_s", "step_ms", "decode_tok_s", "kv_cache_bytes", "mbu")
        if config.mode == "train":
            shown = ("block_size", "step_ms", "tok_s", "mfu", "peak_memory_bytes")
        shown = (*heads_of(config), "batch_size", *shown)
        print("  ".join(f"{key} {rows[-1][key]}" for key in shown if rows[-1][key] is not None), flush=True)
    print(json.dumps(rows[0] if len(rows) == 1 else dict(rows=rows)))


if __name__ == "__main__":
    main()
