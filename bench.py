"""Times decoding or training of one shape, or of every combination of listed values.

    python bench.py --mode=decode --n_layer=12 --n_head=12 --n_kv_head=12,4,1 --batch_size=1,8
    python bench.py --mode=train --batch_size=12 --block_size=64
    python bench.py --mode=scale > docs/scale.md

--key=1,2,4 lists values. Each combination prints one line. The last line of output is JSON: the
row of results, or {"rows": [...]} for several. --mode=scale prints what the sizes in config/ would
take on many GPUs. It is calculated, not measured.
"""
import ctypes
import gc
import json
import os
import resource
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model import GPT, SETTINGS_OF, GPTConfig
from nanogqa import checkpoint, costs
from nanogqa.batches import MicroBatch, dropout_seeds
from nanogqa.cache import KVCache
from nanogqa.configurator import (
    UserError,
    build,
    check_pattern,
    choices_of,
    in_range,
    parse,
    program,
    subset,
)
from nanogqa.distributed import world
from nanogqa.fast import keep_freed_memory, packs, prepare_for_decoding
from nanogqa.report import table
from nanogqa.runtime import (
    check_memory,
    compile_for_decoding,
    compile_model,
    lines_of,
    pick_runtime,
)
from sample import prefill
from train import TrainConfig, backward, make_model, make_optimizers, update

WARMUP_TOKENS = 4  # decoding steps before the first timed run
WARMUP_STEPS = 5  # training steps before the first timed one

Mode = Literal["decode", "train", "scale"]

SHARED_SETTINGS = ("window", "global_every")  # of attention, whatever its kind
HEADS = ("attention", *SETTINGS_OF["gqa"], *SETTINGS_OF["mla"], *SHARED_SETTINGS)
# the settings that one mode alone reads
SETTINGS_OF_MODE = {
    "decode": ("out_dir", "prompt_len", "prefill", "new_tokens", "repeats"),
    "train": ("block_size", "dropout", "steps", "micro_steps", "optimizer", "trainable",
              "recompute"),
}
# what each mode prints of a row, beside HEADS, settings with several values, and batch_size
SHOWN = {
    "decode": ("prompt_len", "prefill_s", "step_ms", "decode_tok_s", "kv_cache_bytes", "mbu"),
    "train": ("block_size", "micro_steps", "step_ms", "tok_s", "mfu", "peak_memory_bytes"),
}


@dataclass
class BenchConfig(GPTConfig):
    # what to time
    mode: Mode = "decode"  # decode: time generation; train: time steps; scale: print docs/scale.md
    out_dir: str | None = None  # decode: a checkpoint, whose model is timed; None: random weights
    vocab_size: int | None = None  # rows of the embedding table; None: 257, of the byte tokenizer
    batch_size: int = 1  # sequences
    seed: int = 1337  # of weights and tokens
    # decoding, at a context of prompt_len + new_tokens instead of block_size
    prompt_len: int = 64  # tokens in the cache before the first step
    prefill: bool = True  # read a prompt; False: fill the cache with random values
    new_tokens: int = 32  # steps of each run
    repeats: int = 3  # runs; the one with the smallest median counts
    # training
    steps: int = 50  # timed steps; their median counts
    micro_steps: int = 1  # forward and backward passes of a step, of batch_size sequences each
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw or muon, as in train.py
    trainable: str = ""  # as in train.py: a pattern of the weights that are trained
    recompute: bool = False  # as in train.py: recompute activations in the backward pass
    # where it runs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # as in sample.py or train.py
    compile: Literal["auto", True, False] = "auto"  # torch.compile, as in sample.py or train.py
    fast: bool = True  # nanogqa/fast.py; False: the plain modules of model.py

    def __post_init__(self):
        super().__post_init__()
        in_range(self, "batch_size prompt_len new_tokens steps micro_steps repeats", low=1)
        in_range(self, "seed", low=0)
        check_pattern(self, "trainable", "q_proj|k_proj")
        if self.vocab_size is None:
            self.vocab_size = 257  # of the byte tokenizer: 256 bytes and end-of-text
        if self.mode == "decode":
            self.block_size = self.prompt_len + self.new_tokens


def heads_of(config):
    """The kind of attention and its settings, for a row of results. Every row has the sizes, whose
    default is None, as None if they belong to another kind. Other settings are there only if they
    are off their defaults."""
    row = {"attention": config.attention}
    defaults = {f.name: f.default for f in fields(config)}
    for kind, names in SETTINGS_OF.items():
        for name in names:
            value = getattr(config, name)
            is_size = defaults[name] is None
            if is_size and kind != config.attention:
                value = None
            if is_size or value != defaults[name]:
                row[name] = value
    for name in SHARED_SETTINGS:
        if getattr(config, name) != defaults[name]:
            row[name] = getattr(config, name)
    return row


def start_row(mode, config):
    """The first entries of a row of results: what was timed."""
    return dict(mode=mode, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                **heads_of(config))


# -- the machine -----------------------------------------------------------------------------------

def clock(runtime):
    """Seconds, once the device has finished its work."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    if runtime.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def bandwidth(runtime):
    """Peak memory bandwidth in bytes/s: looked up for GPUs, measured on CPUs, None if unknown."""
    if runtime.device.type != "cpu":
        return costs.peak_of(costs.PEAK_BANDWIDTH, runtime.device)
    a, b = torch.ones(2, 2**26).unbind()  # 256 MiB each, more than any cache holds
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.dot(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * a.nbytes / min(seconds)


def reset_peak(runtime):
    """Makes peak_memory count from now on. Only CUDA and Linux can: elsewhere the peak stays that
    of the whole process."""
    gc.collect()  # the previous row's compiled model is a cycle of references
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        keep_freed_memory(False)  # so that malloc_trim returns what the previous row has freed
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory(runtime):
    """Most bytes held since reset_peak: allocated ones on CUDA, otherwise resident ones beyond
    those after the imports."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - AFTER_IMPORTS


def resident(name):
    """Bytes of memory that the process holds (VmRSS), or the most that it has held (VmHWM).

    Elsewhere than on Linux both are the most. On Linux that of getrusage would start at the peak of
    the program that started this one.
    """
    for line in lines_of("/proc/self/status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


AFTER_IMPORTS = resident("VmRSS")


# -- --mode=decode ---------------------------------------------------------------------------------

@torch.inference_mode()
def decode(config, runtime, peak_bandwidth):
    """A row of results: a prompt is read once, and each run continues it by new_tokens tokens.

    peak_bandwidth is that of the machine in bytes/s; None where it is unknown.
    """
    reset_peak(runtime)
    model = load_model(config, runtime.dtype).to(runtime.device, runtime.dtype).eval()
    gpt_config, B = model.config, config.batch_size
    tokens = config.prompt_len + config.new_tokens // 2  # in the cache, the mean over a run
    bytes_per_step = costs.bytes_per_step(model, B, tokens, runtime.dtype)
    decoding = decoding_of(config, runtime)
    bound = costs.decoding_bytes(model, decoding)
    if runtime.device.type == "cpu":
        settings = "batch_size, prompt_len or new_tokens"
        floor = costs.decoding_floor(gpt_config, costs.num_params(model), decoding, settings)
        check_memory(floor)
    if config.fast:
        prepare_for_decoding(model, B)

    began = clock(runtime)
    cache = KVCache(gpt_config, B, config.block_size, model.embed.weight, static=runtime.compile)
    forward = model
    if runtime.compile:
        forward = compile_for_decoding(model, runtime)
    token, prefill_s = fill_cache(forward, cache, gpt_config, config, runtime)
    cache.set_length(config.prompt_len)
    time_run(forward, token, cache, min(WARMUP_TOKENS, config.new_tokens), runtime)
    warmup_s = clock(runtime) - began
    medians = []
    for _ in range(config.repeats):
        cache.set_length(config.prompt_len)
        medians.append(time_run(forward, token, cache, config.new_tokens, runtime))
    step = min(medians)

    mbu = None  # model bandwidth utilization: the share of the bandwidth that the step reads
    if peak_bandwidth:
        mbu = bytes_per_step / step / peak_bandwidth
    row = start_row("decode", gpt_config)
    row.update(
        batch_size=B, prompt_len=config.prompt_len, new_tokens=config.new_tokens,
        warmup_s=warmup_s, prefill_s=prefill_s, step_ms=step * 1e3, decode_tok_s=B / step,
        kv_cache_bytes=cache.nbytes, bytes_per_step=bytes_per_step,
        bandwidth_gb_s=bytes_per_step / step / 1e9, mbu=mbu,
        peak_memory_bytes=peak_memory(runtime), memory_bound_bytes=sum(bound.values()))
    return row


def load_model(config, dtype):
    """The model of the checkpoint in out_dir, or a new one of the given shape, which never exists
    in a wider dtype, so that the bound of memory holds."""
    if config.out_dir is None:
        torch.set_default_dtype(dtype)
        try:
            return checkpoint.new_model(GPT, subset(GPTConfig, config), config.seed)
        finally:
            torch.set_default_dtype(torch.float32)
    state = checkpoint.load(config.out_dir, GPTConfig)
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state)
    model.config.block_size = config.block_size
    return model


def decoding_of(config, runtime):
    """What is decoded, for costs.decoding_bytes."""
    prompt_len = config.prompt_len
    if not config.prefill:
        prompt_len = 1  # no step reads more than one token
    return costs.Decoding(
        batch_size=config.batch_size, prompt_len=prompt_len, max_length=config.block_size,
        dtype=runtime.dtype, packed=config.fast and packs(runtime.device, runtime.dtype),
        static=runtime.compile, folded=runtime.device.type != "cpu")


def fill_cache(forward, cache, gpt_config, config, runtime):
    """Fills prompt_len places of cache.

    Returns the next token of each row, (B, 1), and the seconds that reading the prompt took: None
    where no prompt is read.
    """
    generator = torch.Generator().manual_seed(config.seed)
    size = (config.batch_size, config.prompt_len)
    idx = torch.randint(gpt_config.vocab_size, size, generator=generator).to(runtime.device)
    if not config.prefill:
        for tensors in cache.layers:
            for x in tensors:
                x.normal_()
        # as contiguous as the tokens that follow: torch.compile compiles anew for other strides
        return idx[:, :1].clone(memory_format=torch.contiguous_format), None
    for _ in range(2):  # the first time is the warm-up
        cache.rewind(0)
        start = clock(runtime)
        logits = prefill(forward, idx, cache)
        token = logits[:, -1].argmax(-1, keepdim=True)
        seconds = clock(runtime) - start
    return token, seconds


def time_run(forward, token, cache, steps, runtime):
    """Median seconds of that many greedy steps, the first of which reads token, (B, 1).

    Time depends on how many tokens the cache holds, not on which: setting its length is enough
    between two runs.
    """
    seconds = []
    for _ in range(steps):
        start = clock(runtime)
        logits = forward(token, cache=cache, logits="last")[0]
        token = logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(clock(runtime) - start)
    return statistics.median(seconds)


# -- --mode=train ----------------------------------------------------------------------------------

def train(config, runtime):
    """A row of results: the steps of train.py, on random tokens."""
    reset_peak(runtime)
    keep_freed_memory()
    B, T = config.batch_size, config.block_size
    tokens = config.micro_steps * B * T  # of a step
    settings = TrainConfig(
        **asdict(subset(GPTConfig, config)), tokens_per_step=tokens, batch_size=B,
        optimizer=config.optimizer, trainable=config.trainable, recompute=config.recompute,
        seed=config.seed, fast=config.fast)
    steps = config.steps
    if runtime.device.type != "cpu":
        steps = 0  # on a GPU, only the weights and the data pass through the machine's memory
    check_memory(costs.training_floor(
        settings, costs.count_params(GPT, settings), B * T, 1, steps))
    model = make_model(settings, None, runtime)
    optimizers = make_optimizers(model, settings)
    rng = np.random.default_rng(config.seed)

    def add_gradient(forward):
        batches = []
        for _ in range(config.micro_steps):
            x, y = rng.integers(config.vocab_size, size=(2, B, T))
            batches.append(MicroBatch(x, y, dropout_seeds(settings, 0, B)))
        backward(forward, batches, runtime)

    def time_step():
        start = clock(runtime)
        add_gradient(forward)
        update(model, optimizers, settings.grad_clip)
        return clock(runtime) - start

    began = clock(runtime)
    forward = compile_model(model, runtime, add_gradient)
    model.zero_grad(set_to_none=True)
    for _ in range(WARMUP_STEPS):
        time_step()
    warmup_s = clock(runtime) - began
    step = statistics.median([time_step() for _ in range(config.steps)])

    row = start_row("train", config)
    row.update(
        batch_size=B, block_size=T, micro_steps=config.micro_steps, warmup_s=warmup_s,
        step_ms=step * 1e3, tok_s=tokens / step, mfu=costs.mfu(tokens / step, model, runtime),
        peak_memory_bytes=peak_memory(runtime))
    return row


# -- --mode=scale: docs/scale.md -------------------------------------------------------------------

SIZES = ("gpt2_124m", "gpt2_350m", "gpt2_1.5b", "llama_1b", "llama_8b")  # files of config/
SIZES_WITH_STEPS = ("gpt2_124m", "gpt2_1.5b", "llama_8b")  # those with a table of steps
CLUSTERS = ((1, False), (8, False), (8, True), (64, False), (64, True), (1024, False),
            (1024, True))  # GPUs, whether FSDP shards the weights

SIZE_COLUMNS = ("config", "parameters", "GFLOPs per token", "tokens, billions", "GPU-hours",
                "DDP, GB", "recomputing", "FSDP, GB", "recomputing")
STEP_COLUMNS = ("GPUs", "", "tokens per step", "memory, GB", "recomputing, GB", "sent, GB",
                "computing, s", "sending, s", "tokens/s, H100", "tokens/s, H200")


def size_of(name):
    """(TrainConfig of config/NAME.py, its GPT without values of the weights)."""
    path = Path(__file__).resolve().parent / "config" / f"{name}.py"
    config = build(TrainConfig, parse(TrainConfig, [str(path)], ""))
    return config, costs.meta_model(GPT, subset(GPTConfig, config))


def scale_document():
    """The text of docs/scale.md."""
    sizes = {name: size_of(name) for name in SIZES}
    overview = table(SIZE_COLUMNS, [size_row(name, *sizes[name]) for name in SIZES])
    steps = []
    for name in SIZES_WITH_STEPS:
        rows = []
        for gpus, sharded in CLUSTERS:
            rows.append(step_row(costs.scale(*sizes[name], gpus, sharded), gpus, sharded))
        steps += ["", f"### {name}", "", table(STEP_COLUMNS, rows)]
    return SCALE.format(
        overview=overview, steps="\n".join(steps),
        peak=round(costs.PEAK_FLOPS["H100"] / 1e12), mfu=costs.ASSUMED_MFU,
        h100=round(costs.GPU_MEMORY["H100"] / 1e9), h200=round(costs.GPU_MEMORY["H200"] / 1e9),
        usable=round(costs.USABLE * 100), nvlink=round(costs.NVLINK / 1e9),
        network=round(costs.NETWORK / 1e9))


def gigabytes(n):
    return f"{n / 1e9:.1f}"


def size_row(name, config, model):
    """The cells of one size, on 8 GPUs."""
    ddp = costs.scale(config, model, 8, False)
    fsdp = costs.scale(config, model, 8, True)
    hours = config.max_steps * ddp["compute_s"] * 8 / 3600
    return [
        f"[{name}](../config/{name}.py)",
        f"{costs.num_params(model):,}",
        f"{costs.flops_per_token(model) / 1e9:.2f}",
        f"{config.max_steps * config.tokens_per_step / 1e9:.1f}",
        f"{hours:,.0f}",
        gigabytes(ddp["memory"]),
        gigabytes(ddp["recomputing"]),
        gigabytes(fsdp["memory"]),
        gigabytes(fsdp["recomputing"]),
    ]


def step_row(row, gpus, sharded):
    """The cells of a step that costs.scale has calculated."""
    if gpus == 1:
        kind = "one GPU"
    elif sharded:
        kind = "FSDP"
    else:
        kind = "DDP"
    return [
        f"{gpus:,}",
        kind,
        f"{row['tokens']:,}",
        gigabytes(row["memory"]),
        gigabytes(row["recomputing"]),
        gigabytes(row["sent"]),
        f"{row['compute_s']:.3f}",
        f"{row['communication_s']:.3f}",
        *(speed(row, memory) for memory in costs.GPU_MEMORY.values()),
    ]


def speed(row, memory):
    """Tokens per second of all GPUs with that many bytes each, as text: at worst and at best."""
    rates = costs.scale_rates(row, memory)
    if rates is None:
        return "does not fit"
    worst, best = three_digits(rates.worst), three_digits(rates.best)
    text = f"{worst} to {best}"
    if worst == best:
        text = best
    if rates.recomputing:
        text += ", recomputing"
    return text


def three_digits(number):
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}"


SCALE = """# What larger runs would take

`python bench.py --mode=scale` prints this page. It is calculated from the formulas in
nanogqa/costs.py and from data sheets. Nothing here was run. DDP and FSDP are `--parallel=ddp` and
`--parallel=fsdp` of train.py. Recomputing (activation checkpointing) is its `--recompute=True`.

## Sizes

Memory is per GPU, on 8 GPUs. GPU-hours count computing only, so they are the best case under the
assumptions below. 1 GB is 10^9 bytes.

{overview}

## Steps

Memory, bytes sent and seconds are per GPU and optimizer step; seconds are without recomputing.
Tokens/s are those of all GPUs together, at worst and at best. Where a step fits into memory only
with recomputing, they include it.
{steps}

## Assumptions

- *GPUs*: {peak} TFLOP/s in dense bfloat16 on H100 and H200 (SXM), with {h100} and {h200} GB. A run
  fits if it needs at most {usable} % of the memory. The rest is left for CUDA itself, fragmentation
  in the allocator and temporary buffers, which are not counted.
- *Computing*: a model FLOPs utilization (MFU) of {mfu}, however small a GPU's share of the batch
  is. Small shares will not reach it. FLOPs per token are `flops_per_token` of nanogqa/costs.py: 6
  per weight of a matrix product and 12 L H D T for attention. Recomputing adds a forward pass, a
  third more. Data loading, the optimizer's own time, evaluation and checkpoints are not counted.
- *Batch*: tokens_per_step and batch_size of the config. batch_size is at most a GPU's share. With
  more GPUs than sequences, each GPU takes one sequence, so the batch is larger than the config's.
- *Memory*: float32 weights and gradients and AdamW's two moments take 16 bytes per parameter (ZeRO,
  arXiv 1910.02054). With one GPU or DDP, each GPU holds all of them and 2 bytes per parameter for
  autocast's bfloat16 copies. With FSDP, each GPU holds its share of the 16 bytes. It also holds 6
  bytes (bfloat16 weight, float32 gradient) for each gathered parameter: those of the embedding
  tables and of two blocks.
- *Activations*: what eager autograd keeps per token under bfloat16 autocast with flash attention.
  Each block keeps 18 C + 4 (H + K) D + 8 F + 4 H bytes, and with qk_norm 4 (H + K) D more (C is
  n_embd, F n_ff, H and K are the numbers of heads of width D). These are the float32 inputs of two
  norms; a bfloat16 copy of the norm's output for each of five projections; q, k, v, the output of
  attention and its log-sum-exp; and four tensors of the MLP. Outside the blocks there are 12 C
  bytes, and in the loss head 10 bytes for each of at most 2^28 logits. Recomputing keeps 4 C for
  each block, and all of one block. torch.compile keeps less.
- *Communication*: DDP's ring all-reduce of float32 gradients sends 2 (n - 1) / n times 4 bytes per
  parameter, once a step. FSDP gathers bfloat16 weights twice and reduce-scatters float32 gradients
  in every micro-step, (n - 1) / n times 8 bytes.
- *Links*: up to 8 GPUs are connected by NVLink at {nvlink} GB/s one way. With more, each GPU has
  {network} GB/s out of its node of 8. Each ring crosses a node's border once, and eight rings share
  the node's links. A single ring would have {network} GB/s and take eight times as long. Congestion
  and latency are not counted; latency matters for small models on many GPUs.
- *Overlap*: at best, sending hides behind computing: max(computing, sending). At worst, computing
  waits for it: computing + sending.

## Checked against measurement

Speed, memory and communication: not measured on a GPU (no GPU was at hand). The tests compare the
activations of a block with what autograd keeps on a CPU, and the parameters with the published
numbers.
"""


# -- the program -----------------------------------------------------------------------------------

@program(remedy="lower batch_size, block_size, prompt_len, new_tokens or the size of the model")
def main(argv):
    given = parse(BenchConfig, argv, __doc__, axes=True)
    configs = [build(BenchConfig, values) for values in choices_of(given, BenchConfig)]
    check(configs, given)
    if configs[0].mode == "scale":
        print(scale_document(), end="")
        return
    rows = time_all(configs, [key for key, value in given.items() if isinstance(value, list)])
    result = {"rows": rows}
    if len(rows) == 1:
        result = rows[0]
    print(json.dumps(result))


def check(configs, given):
    """Raises UserError if settings exclude each other, or if there are several ranks."""
    if world().ranks > 1:
        raise UserError("bench.py times one device: start it without torchrun, with WORLD_SIZE, "
                        "RANK and LOCAL_RANK unset")
    for config in configs:
        if config.mode == "scale" and (len(given) > 1 or len(configs) > 1):
            raise UserError("--mode=scale takes its shapes from config/ and no other setting: "
                            "leave the rest out")
    modes = {config.mode for config in configs}
    for mode, names in SETTINGS_OF_MODE.items():
        unread = [name for name in names if name in given]
        for other in sorted(modes - {mode}):
            if unread:
                raise UserError(f"--mode={other} does not read {', '.join(unread)}: leave out what "
                                f"is for --mode={mode}, or time that in a command of its own")
    if given.get("out_dir") is not None:
        sizes = [field.name for field in fields(GPTConfig) if field.name in given]
        if sizes:
            raise UserError(f"{', '.join(sizes)} and out_dir exclude each other: the checkpoint "
                            "has its own shape, so leave out one or the other")


def time_all(configs, axes=()):
    """A row of results for each config; prints a line for each as soon as it is there.

    axes are the settings of which several values are timed: a row has them all.
    """
    rows = []
    bandwidths = {}  # the bandwidth of each device
    for config in configs:
        decoding_steps = None
        if config.mode == "decode":
            decoding_steps = config.new_tokens
        runtime = pick_runtime(config.device, config.dtype, config.compile, decoding_steps)
        if config.mode == "train":
            row = train(config, runtime)
        else:
            if runtime.device not in bandwidths:
                bandwidths[runtime.device] = bandwidth(runtime)
            row = decode(config, runtime, bandwidths[runtime.device])
        now = runtime.describe()
        row.update(device=now["device"], dtype=now["dtype"], compile=now["compile"],
                   torch=torch.__version__)
        for name in axes:
            row.setdefault(name, getattr(config, name))
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = float(f"{value:.6g}")  # digits, not decimals: an mbu may be tiny
        shown = (*HEADS, *axes, "batch_size", *SHOWN[config.mode])
        show(row, dict.fromkeys(shown))
        rows.append(row)
    return rows


def show(row, keys):
    """Prints the entries of a row of results that have a value."""
    words = [f"{key} {row[key]}" for key in keys if row.get(key) is not None]
    print("  ".join(words), flush=True)


if __name__ == "__main__":
    main()
