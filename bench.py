"""Times decoding or training of one shape, or of every combination of the values that --key=1,2,4 lists.

    python bench.py --mode=decode --n_layer=12 --n_head=12 --n_kv_head=12,4,1 --n_embd=768 --vocab_size=50304 --batch_size=1,8
    python bench.py --mode=train --batch_size=12 --block_size=64

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
from typing import Literal

import torch

import checkpoint
from configurator import UserError, build, combinations, parse, program
from model import GPTConfig, KVCache
from sample import compile_for_decoding, decoding_bytes, prefill, prefill_chunk, prepare_for_decoding
from train import TrainConfig, compile_model, keep_freed_memory, make_optimizer, peak_flops, pick_runtime

# peak memory bandwidth in bytes/s by a part of the device's name (NVIDIA's data sheets)
PEAK_BANDWIDTH = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.04e12, "A100": 1.56e12}


@dataclass
class BenchConfig(GPTConfig):
    mode: Literal["decode", "train"] = "decode"  # one token at a time from a cache, or whole training steps
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
        model = checkpoint.build_model(checkpoint.load(config.out_dir))
        model.config.block_size = config.block_size
    else:
        model = checkpoint.new_model(checkpoint.model_config(config), config.seed)
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
    bound = decoding_bytes(shape, B, config.prompt_len if config.prefill else 1, config.block_size, runtime)
    return dict(mode="decode", n_layer=shape.n_layer, n_head=shape.n_head, n_kv_head=shape.n_kv_head, n_embd=shape.n_embd,
                attention=shape.attention, batch_size=B, prompt_len=config.prompt_len, new_tokens=config.new_tokens,
                warmup_s=runs[0][1] - began, prefill_s=prefill_s, step_ms=step * 1e3, decode_tok_s=B / step,
                kv_cache_bytes=cache.nbytes, bytes_per_step=bytes_per_step, bandwidth_gb_s=bytes_per_step / step / 1e9,
                mbu=bytes_per_step / step / peak if peak else None,
                peak_memory_bytes=peak_memory(runtime), memory_bound_bytes=sum(bound.values()))


def train(config, runtime):
    """One row of results: batch, forward, backward, clip and optimizer, on random tokens."""
    keep_freed_memory()
    peak_memory(runtime, reset=True)
    model = checkpoint.new_model(checkpoint.model_config(config), config.seed).to(runtime.device)
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
    return dict(mode="train", n_layer=config.n_layer, n_head=config.n_head, n_kv_head=config.n_kv_head, n_embd=config.n_embd,
                attention=config.attention, batch_size=B, block_size=T, warmup_s=warmup_s, step_ms=step * 1e3,
                tok_s=B * T / step, mfu=B * T * model.flops_per_token(T) / step / flops if flops else None,
                peak_memory_bytes=peak_memory(runtime))


@program
def main(argv):
    given = parse(BenchConfig, argv, __doc__, axes=True)
    configs, rows, peak = [build(BenchConfig, values) for values in combinations(given)], [], None
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
        shown = ("attention", "n_kv_head", "batch_size", "prompt_len", "prefill_s", "step_ms", "decode_tok_s", "kv_cache_bytes", "mbu")
        if config.mode == "train":
            shown = ("attention", "n_kv_head", "batch_size", "block_size", "step_ms", "tok_s", "mfu", "peak_memory_bytes")
        print("  ".join(f"{key} {rows[-1][key]}" for key in shown), flush=True)
    print(json.dumps(rows[0] if len(rows) == 1 else dict(rows=rows)))


if __name__ == "__main__":
    main()
