"""The checks of gpu.py: each compares two ways to compute the same, on the device it is given.

A check returns {"checks": [...], "note": text}. Each of its checks holds a figure that must be at
most its limit. toy=True selects sizes for a CPU.
"""
import atexit
import contextlib
import functools
import io
import os
import random
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import train
from model import (
    GPT,
    Context,
    GPTConfig,
    LatentAttention,
    attend,
    rope_cos_sin,
    rope_frequencies,
)
from nanogqa import checkpoint, distributed
from nanogqa.batches import Batches, MicroBatch
from nanogqa.cache import KVCache
from nanogqa.dataloader import Dataset
from nanogqa.fast import accelerate, prepare_for_decoding
from nanogqa.log import finite_or_none, read_rows
from nanogqa.runtime import compile_for_decoding, compile_model, pick_runtime
from nanogqa.writer import write_dataset

KINDS = {"MHA": {}, "GQA": dict(n_kv_head=2), "MQA": dict(n_kv_head=1),
         "MLA": dict(attention="mla"), "windows": dict(n_kv_head=2, window=24, global_every=2),
         "all": dict(n_layer=4, n_kv_head=2, window=24, global_every=2, kv_share=2, kv_tied=True,
                     rope_fraction=0.5)}
SIZE = dict(n_layer=4, n_head=8, n_embd=512, vocab_size=512, block_size=256)
TOY_SIZE = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=257, block_size=64)
CACHES = {"growing cache": False, "static cache": True}
# largest relative difference between two ways to compute the same
CLOSE = {"float32": 1e-4, "bfloat16": 5e-2}


def check(what, figure, limit):
    """One comparison: passed if figure is at most limit. A figure that is not finite is None."""
    figure = float(figure)
    return dict(what=what, figure=finite_or_none(figure), limit=limit, passed=figure <= limit)


def result(checks, note=""):
    return dict(checks=checks, note=note)


def difference(x, expected):
    """The length of x - expected over that of expected."""
    x, expected = x.double().cpu(), expected.double().cpu()
    return ((x - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def size_of(toy):
    if toy:
        return TOY_SIZE
    return SIZE


def config_of(kind, toy):
    return GPTConfig(**{**size_of(toy), **KINDS[kind]})


def random_ids(config, rows, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)


# -- the same numbers ------------------------------------------------------------------------------

def plain_against_fast(device, dtype, toy):
    """Losses and gradients of training with the plain modules and with those of nanogqa/fast.py."""
    runtime = pick_runtime(device, dtype, False)
    checks = []
    for kind in KINDS:
        config = config_of(kind, toy)
        ids = random_ids(config, 4, config.block_size).numpy()
        batches = [MicroBatch(ids, np.roll(ids, -1, 1), seeds=None)]
        losses, gradients = [], []
        for change in (lambda model: model, accelerate):
            model = change(GPT(config)).to(runtime.device)
            losses.append(train.backward(model, batches, runtime))
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        checks.append(check(f"{kind}, loss", difference(losses[1], losses[0]), CLOSE[dtype] / 10))
        checks.append(check(f"{kind}, gradient", difference(*reversed(gradients)), CLOSE[dtype]))
    return result(checks)


def decoding_model(kind, toy, runtime):
    model = GPT(config_of(kind, toy)).to(runtime.device, runtime.dtype).eval()
    return prepare_for_decoding(model, 2)


@torch.inference_mode()
def cached_against_full(device, dtype, toy):
    """Logits of tokens that are read in parts, with both kinds of cache, and at once without."""
    runtime = pick_runtime(device, dtype, False, decoding_steps=1)
    checks = []
    for kind in KINDS:
        model = decoding_model(kind, toy, runtime)
        length = model.config.block_size
        ids = random_ids(model.config, 2, length).to(runtime.device)
        full = model(ids)[0]
        for name, static in CACHES.items():
            cache = KVCache(model.config, 2, length, model.embed.weight, static=static)
            parts = ids.split([length // 2, 1, length // 4, 1, length // 4 - 2], dim=1)
            logits = torch.cat([model(part, cache=cache)[0] for part in parts], dim=1)
            checks.append(check(f"{kind}, {name}", difference(logits, full), CLOSE[dtype]))
    return result(checks)


@torch.inference_mode()
def ragged_rows(device, dtype, toy):
    """The logits of rows of different lengths in one batch, padded at the start, and alone."""
    runtime = pick_runtime(device, dtype, False, decoding_steps=1)
    checks = []
    for kind in KINDS:
        model = decoding_model(kind, toy, runtime)
        longest = model.config.block_size
        padding = [0, longest // 3, longest - 5]
        ids = random_ids(model.config, 3, longest).to(runtime.device)
        for name, static in CACHES.items():
            cache = KVCache(model.config, 3, longest, model.embed.weight, static=static)
            cache.padding = torch.tensor(padding, device=runtime.device)
            parts = ids.split([longest // 2, longest // 2 - 1, 1], dim=1)
            logits = torch.cat([model(part, cache=cache)[0] for part in parts], dim=1)
            worst = 0.0
            for row, start in enumerate(padding):
                alone = model(ids[row:row + 1, start:])[0][0]
                worst = max(worst, difference(logits[row, start:], alone))
            checks.append(check(f"{kind}, {name}", worst, CLOSE[dtype]))
    return result(checks)


def gqa_ways(device, dtype, toy):
    """Attention with shared heads: native (is_causal), folded (under a mask) and expanded (copied
    to all query heads), with gradients, beside float64 on the CPU. cuDNN's kernel is allowed once:
    sample.py turns it off."""
    size, checks = size_of(toy), []
    H, T, D = size["n_head"], size["block_size"], size["n_embd"] // size["n_head"]
    for K in (H, H // 2, 1):
        torch.manual_seed(K)
        q, k, v = (torch.randn(2, heads, T, D, dtype=torch.float64) for heads in (H, K, K))
        expected = attention_and_gradients(expanded, q, k, v, torch.float64, "cpu")
        for way, cudnn in ((native, True), (native, False), (folded, False), (expanded, False)):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            got = attention_and_gradients(way, q, k, v, getattr(torch, dtype), device)
            worst = max(map(difference, got, expected))
            name = way.__name__
            if cudnn:
                name += " with cuDNN allowed"
            checks.append(check(f"{name}, {K} of {H} heads", worst, CLOSE[dtype]))
    return result(checks)


def native(q, k, v):
    return attend(q, k, v)


def folded(q, k, v):
    T = q.size(2)
    return attend(q, k, v, torch.ones(1, T, T, dtype=torch.bool, device=q.device).tril())


def expanded(q, k, v):
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_and_gradients(way, q, k, v, dtype, device):
    inputs = [x.clone().to(device, dtype).requires_grad_() for x in (q, k, v)]
    y = way(*inputs)
    y.square().sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


@torch.inference_mode()
def mla_ways(device, dtype, toy):
    """One layer of latent attention over a prompt, expanded and absorbed."""
    runtime = pick_runtime(device, dtype, False, decoding_steps=1)
    config = config_of("MLA", toy)
    T = min(config.block_size, config.kv_lora_rank)  # more are expanded in both ways
    torch.manual_seed(1)
    layer = LatentAttention(config, 0, config.cache_specs()[0]).to(runtime.device, runtime.dtype)
    x = torch.randn(2, T, config.n_embd).to(runtime.device, runtime.dtype)
    positions = torch.arange(T, device=runtime.device)[None]
    cos, sin = rope_cos_sin(positions, rope_frequencies(config, runtime.device))
    mask = torch.ones(1, T, T, dtype=torch.bool, device=runtime.device).tril()
    y = layer(x, Context(cos, sin, {None: None}, None), None)[0]
    absorbed = layer(x, Context(cos, sin, {None: mask}, KVCache(config, 2, T, x)), None)[0]
    return result([check("absorbed against expanded", difference(absorbed, y), CLOSE[dtype])])


# -- torch.compile and CUDA graphs -----------------------------------------------------------------

STEPS = 64  # compiled decoding steps
REPLAYED = 8  # further steps, under the profiler


@torch.inference_mode()
def compiled_steps(device, dtype, toy, kind):
    """Decoding steps of sample.py's compiled forward pass beside one eager pass over all tokens;
    how many graphs they take, and whether CUDA replays them."""
    runtime = pick_runtime(device, dtype, True, decoding_steps=STEPS)
    model = decoding_model(kind, toy, runtime)
    prompt_len = 40
    model.config.block_size = prompt_len + STEPS + REPLAYED
    ids = random_ids(model.config, 2, model.config.block_size).to(runtime.device)
    full = model(ids)[0][:, prompt_len:]
    counters = torch._dynamo.utils.counters
    counters.clear()
    forward = compile_for_decoding(model, runtime)
    cache = KVCache(model.config, 2, ids.size(1), model.embed.weight, static=True)
    forward(ids[:, :prompt_len], cache=cache, logits="last")
    tokens = ids[:, prompt_len:].split(1, dim=1)

    def steps(tokens):  # a graph writes its next logits where the last ones were
        return [forward(token, cache=cache, logits="last")[0].clone() for token in tokens]
    logits = torch.cat(steps(tokens[:STEPS]), dim=1)
    with torch.profiler.profile() as profile:
        steps(tokens[STEPS:])
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    # the name may end in a version
    replays = sum(count for key, count in calls.items() if key.startswith("cudaGraphLaunch"))
    checks = [
        check("steps against one pass", difference(logits, full[:, :STEPS]), CLOSE[dtype]),
        check("went on in eager mode", not runtime.compile, 0),
        check("graphs beyond one for prompts and one for steps",
              counters["stats"]["unique_graphs"] - 2, 0),
        check("graph breaks", sum(counters["graph_break"].values()), 0),
    ]
    if runtime.device.type == "cuda":
        checks.append(check("steps without a replay", REPLAYED - replays, 0))
        checks.append(check("replays that are no multiple of the steps", replays % REPLAYED, 0))
        checks.append(check("CUDA graphs skipped", counters["inductor"]["cudagraph_skips"], 0))
    names = ("cudaLaunchKernel", "cuLaunchKernel")  # of PyTorch's kernels, and of Triton's
    launches = sum(n for name, n in calls.items() if name.startswith(names)) / REPLAYED
    return result(checks, f"{replays} replays in {REPLAYED} steps, and {launches:.0f} kernels a "
                          "step outside of them")


# -- training --------------------------------------------------------------------------------------

@functools.cache
def text_data():
    """The folder of a byte data set of made-up sentences, deleted when the process ends."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(200)]
    lines = [" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(4000)]
    folder = tempfile.mkdtemp(prefix="gpu")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_dataset([("train", "".join(lines[:3600])), ("val", "".join(lines[3600:]))],
                  Path(folder) / "text", "byte")
    return str(Path(folder) / "text")


def train_settings(toy, **changes):
    size = size_of(toy)
    settings = dict(**size, n_kv_head=2, learning_rate=1e-3, warmup_steps=5, max_steps=50,
                    tokens_per_step=8 * size["block_size"], eval_interval=1000,
                    dataset=text_data())
    return train.TrainConfig(**{**settings, **changes})


def losses(config, device, dtype, compile, steps):
    """The loss of each of the first steps of train.py with these settings."""
    runtime = pick_runtime(device, dtype, compile)
    model = train.make_model(config, None, runtime)
    optimizers = train.make_optimizers(model, config)
    batches = Batches(Dataset(config.dataset), config, runtime)
    forward = compile_model(model, runtime,
                            lambda f: train.backward(f, batches.training(0), runtime))
    model.zero_grad(set_to_none=True)
    values = []
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, config)
        values.append(train.backward(forward, batches.training(step), runtime).item())
        train.update(model, optimizers, config.grad_clip)
    if compile and not runtime.compile:
        raise RuntimeError("torch.compile went on in eager mode: see gpu.log")
    return values


def last_difference(values, expected):
    """The largest difference between the last ten losses of two runs."""
    pairs = zip(values[-10:], expected[-10:], strict=True)
    return max(abs(value - other) for value, other in pairs)


def training_losses(device, toy, optimizer, ways):
    """Training in float32 in eager mode and in other ways, pairs of dtype and compile."""
    steps = 50
    if toy:
        steps = 12
    config = train_settings(toy, optimizer=optimizer)
    expected = losses(config, device, "float32", False, steps)
    checks = [check("float32, last loss less the first", expected[-1] - expected[0], -0.2)]
    for dtype, compile in ways:
        got = losses(config, device, dtype, compile, steps)
        name = f"{dtype}, {'compiled' if compile else 'eager'}, the last ten losses"
        checks.append(check(name, last_difference(got, expected), 0.05))
    return result(checks, f"float32 from {expected[0]:.3f} to {expected[-1]:.3f} in {steps} steps")


def resume(device, toy):
    """A run of train.py, the same again, and one that goes on from the middle of the first."""
    steps, size = 20, size_of(toy)
    with tempfile.TemporaryDirectory() as folder:
        def run(name, *more):
            train.main([
                *(f"--{key}={value}" for key, value in size.items()), f"--dataset={text_data()}",
                f"--tokens_per_step={4 * size['block_size']}", f"--max_steps={steps}",
                f"--eval_interval={steps // 2}", "--eval_tokens=4096", "--warmup_steps=4",
                f"--device={device}", "--compile=False", f"--out_dir={folder}/{name}", *more])
            state = checkpoint.load(f"{folder}/{name}", GPTConfig)
            return state["model"], read_rows(f"{folder}/{name}/metrics.jsonl")[-1]["val_loss"]

        weights, loss = run("first", "--keep_checkpoints=2")
        runs = {"run again": run("again")}
        Path(folder, "resumed").mkdir()
        shutil.copy(f"{folder}/first/ckpt_{steps // 2}.pt", f"{folder}/resumed/ckpt.pt")
        runs["resumed"] = run("resumed", "--init_from=resume")
    checks, notes = [], []
    for name, (others, other_loss) in runs.items():
        checks.append(check(f"{name}, validation loss", abs(other_loss - loss), 0.02))
        largest = max((others[key] - weights[key]).abs().max().item() for key in weights)
        notes.append(f"{name}: the largest difference of a weight is {largest:.1e}")
    return result(checks, "; ".join(notes))


def fsdp(device, toy):
    """Losses under FSDP with one rank, which train.py refuses as of no use, and without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    os.environ.update(place)
    checks = []
    try:
        pick_runtime(device, "float32", False)  # chooses the GPU
        distributed.join_ranks()
        for dtype, limit in (("float32", 1e-3), ("bfloat16", 0.05)):
            expected = losses(train_settings(toy), device, dtype, False, 10)
            got = losses(train_settings(toy, parallel="fsdp"), device, dtype, False, 10)
            checks.append(check(f"{dtype}, losses", last_difference(got, expected), limit))
        torch.distributed.destroy_process_group()
    finally:
        for name in place:
            os.environ.pop(name)
    return result(checks)


def out_of_memory(device, toy):
    """What train.py prints when the device has no memory left: one sentence, exit code 2."""
    tokens = 2**20
    if toy:
        tokens = 2**11
    errors, code = io.StringIO(), None
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(errors),
          few_bytes(device)):
        try:
            train.main([f"--out_dir={folder}/run", f"--tokens_per_step={tokens}", "--compile=False",
                        f"--dataset={text_data()}", f"--device={device}"])
        except SystemExit as error:
            code = error.code
    lines = errors.getvalue().strip().splitlines() or [""]
    said = "there is not enough memory: lower batch_size" in lines[-1]
    return result([check("exit code other than 2", code != 2, 0),
                   check("last line is another", not said, 0),
                   check("tracebacks", errors.getvalue().count("Traceback"), 0)], lines[-1])


@contextlib.contextmanager
def few_bytes(device):
    """Leaves 2 % of the GPU's memory to this process. On a CPU, the first step raises the error."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.02)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def backward(*arguments):
        raise torch.OutOfMemoryError("out of memory")
    kept, train.backward = train.backward, backward
    try:
        yield
    finally:
        train.backward = kept


# -- the kernels of attention ----------------------------------------------------------------------

OPERATOR = "aten::_scaled_dot_product_"


def kernel_of(function):
    """The kernels that scaled_dot_product_attention chooses in a call of function, as text."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = set()
    for event in profile.key_averages():
        if event.key.startswith(OPERATOR) and not event.key.endswith("_backward"):
            name = event.key.removeprefix(OPERATOR).replace("attention", "").replace("__", "_")
            names.add(name.strip("_"))
    return "+".join(sorted(names)) or "none"


def attention_kernels(device, dtype, toy):
    """Which kernel runs in each case, none of which may be "math", the slow reference."""
    cases_of = {}  # kernel -> names of cases
    for kind in KINDS:
        config = config_of(kind, toy)
        config.n_layer = 1
        for case, function in attention_cases(config, device, dtype).items():
            cases_of.setdefault(kernel_of(function), []).append(f"{kind} {case}")
    notes, slow = [], 0
    for kernel, cases in cases_of.items():
        notes.append(f"{kernel}: {', '.join(cases)}")
        if "math" in kernel or kernel == "none":
            slow += len(cases)
    if len(cases_of) == 1:
        notes = [f"{kernel} in all cases"]
    return result([check("cases without a fused kernel", slow, 0)], "; ".join(notes))


def attention_cases(config, device, dtype):
    """{name: function without arguments} of the calls that programs make of a model."""
    runtime = pick_runtime(device, dtype, False)
    model = accelerate(GPT(config)).to(runtime.device)
    ids = random_ids(config, 2, config.block_size)
    batches = [MicroBatch(ids.numpy(), ids.numpy(), seeds=None)]

    def training():
        torch.backends.cuda.enable_cudnn_sdp(True)  # as in train.py
        train.backward(model, batches, runtime)
        pick_runtime(device, dtype, False, decoding_steps=1)  # as in sample.py from here on

    half = config.block_size // 2
    decoding = prepare_for_decoding(GPT(config).to(runtime.device, runtime.dtype).eval(), 2)
    attention = {False: torch.compile(decoding), True: decoding}

    def case(held, new, static=False, eager=True):
        @torch.inference_mode()
        def call():
            cache = KVCache(config, 2, config.block_size, decoding.embed.weight, static=static)
            cache.set_length(held)
            attention[eager](ids[:, :new].to(runtime.device), cache=cache, logits="last")
        return call

    return {"training": training, "prompt": case(0, half), "rest of a prompt": case(half, half),
            "step": case(half, 1), "static step": case(half, 1, static=True),
            "compiled step": case(half, 1, static=True, eager=False)}
