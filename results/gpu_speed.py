"""What gpu.py times: decoding and training here and in two peers, the first command, compare.py.

Each function returns a row of results. The peers are transformers' Llama with a static cache, and
a plain training step of GPT-2's shape as nanoGPT runs it.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from gpu_check import text_data
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
from model import GPT, GPTConfig, HeadLoss
from nanogqa import costs
from nanogqa.configurator import subset
from nanogqa.dataloader import prepare_default
from nanogqa.log import read_rows
from nanogqa.runtime import pick_runtime

ROOT = Path(__file__).resolve().parents[1]


def check_compiled(wanted, runtime):
    """Raises RuntimeError if torch.compile was wanted and a program went on without it."""
    if wanted and not runtime.compile:
        raise RuntimeError("torch.compile went on in eager mode: see gpu.log")


# -- decoding --------------------------------------------------------------------------------------

def decode(**settings):
    """A row of bench.py --mode=decode."""
    config = bench.BenchConfig(mode="decode", **settings)
    runtime = pick_runtime(config.device, config.dtype, config.compile, config.new_tokens)

    def random_model(config, dtype):
        return model_on_device(subset(GPTConfig, config), runtime)
    bench.load_model = random_model  # drawing billions of numbers on the CPU takes minutes
    peak = None
    if runtime.device.type == "cuda":
        peak = bench.bandwidth(runtime)
    row = bench.decode(config, runtime, peak)
    check_compiled(config.compile, runtime)
    row["graphs_skipped"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return row


def model_on_device(config, runtime):
    model = costs.meta_model(GPT, config).to(runtime.dtype).to_empty(device=runtime.device)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, parameter.size(1) ** -0.5)
    return model


def transformers_decode(**settings):
    """Decoding by transformers' Llama of the same shape with its static cache, which its generate
    compiles on a GPU."""
    import transformers
    config = bench.BenchConfig(mode="decode", **settings)
    runtime = pick_runtime(config.device, config.dtype, config.compile)
    torch.set_default_dtype(runtime.dtype)
    with runtime.device:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd,
            intermediate_size=config.n_ff, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            tie_word_embeddings=config.tie_embeddings, attn_implementation="sdpa",
            max_position_embeddings=config.block_size)).eval()
        idx = torch.randint(config.vocab_size - 1, (config.batch_size, config.prompt_len))
    torch.set_default_dtype(torch.float32)
    ticks = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            ticks.append(bench.clock(runtime))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    medians = []
    for _ in range(1 + config.repeats):  # the first is the warm-up
        ticks.clear()
        model.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=config.new_tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None, cache_implementation="static",
            stopping_criteria=transformers.StoppingCriteriaList([Clock()]))
        medians.append(statistics.median(after - before for before, after in pairwise(ticks)))
    step = min(medians[1:])
    return dict(batch_size=config.batch_size, prompt_len=config.prompt_len, step_ms=step * 1e3,
                decode_tok_s=config.batch_size / step, transformers=transformers.__version__)


BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


@torch.inference_mode()
def attention(device, dtype, **row):
    """Milliseconds of the attention of one decoding step by each kernel: without a mask, under
    one, and the first time at a new number of tokens. row has batch_size, heads of keys and
    values, rows of queries of each head, tokens and width of a head."""
    B, K, T, S, D = (row[key] for key in ("batch_size", "heads", "rows", "tokens", "width"))
    place = dict(device=device, dtype=getattr(torch, dtype))
    q, k = torch.randn(B, K, T, D, **place), torch.randn(B, K, S + 3, D, **place)
    mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    for name, backend in BACKENDS.items():
        for case, masked in (("", None), (", mask", mask)):
            with sdpa_kernel(backend):
                try:
                    row[f"{name}{case}"] = milliseconds(q, k[:, :, :S], masked, 20)
                    if masked is None:
                        new = [milliseconds(q, k[:, :, :S + more], None, 1) for more in (1, 2)]
                        row[f"{name}, new length"] = min(new)
                except RuntimeError:  # the kernel does not support this case
                    row[f"{name}{case}"] = None
                    if q.is_cuda:
                        torch.cuda.synchronize()  # raises after an error of CUDA itself
    return row


def milliseconds(q, k, mask, repeats):
    """Median time of a call. With one repeat, that of the first call."""
    device = q.device.type
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, k, k, mask)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


# -- training --------------------------------------------------------------------------------------

def train(chunked=True, **settings):
    """A row of bench.py --mode=train; chunked=False computes all logits at once."""
    config = bench.BenchConfig(mode="train", **settings)
    runtime = pick_runtime(config.device, config.dtype, config.compile)
    make_model = bench.make_model

    def without_chunks(*arguments):
        model = make_model(*arguments)
        model.head_loss = HeadLoss()
        return model
    if not chunked:
        bench.make_model = without_chunks
    try:
        row = bench.train(config, runtime)
    finally:
        bench.make_model = make_model
    check_compiled(config.compile, runtime)
    return row


class PlainBlock(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    def __init__(self, layers, heads, width, vocab_size, context):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[PlainBlock(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.places(torch.arange(idx.size(1), device=idx.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_train(**settings):
    """Training steps as a plain PyTorch program takes them: nanoGPT's shape, loss and optimizer."""
    config = bench.BenchConfig(mode="train", **settings)
    runtime = pick_runtime(config.device, config.dtype, config.compile)
    bench.reset_peak(runtime)
    model = PlainGPT(config.n_layer, config.n_head, config.n_embd, config.vocab_size,
                     config.block_size).to(runtime.device)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), fused=True)
    forward = torch.compile(model) if config.compile else model
    shape = (2, config.batch_size, config.block_size)
    seconds = []
    for _ in range(bench.WARMUP_STEPS + config.steps):
        start = bench.clock(runtime)
        x, y = torch.randint(config.vocab_size, shape).to(runtime.device)
        with runtime.autocast():
            loss = forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(bench.clock(runtime) - start)
    step = statistics.median(seconds[bench.WARMUP_STEPS:])
    tokens = config.batch_size * config.block_size
    products = parameters - model.places.weight.numel()
    flops = 6 * products + 12 * config.n_layer * config.n_embd * config.block_size
    peak, mfu = costs.peak_of(costs.PEAK_FLOPS, runtime.device), None
    if peak is not None:
        mfu = tokens / step * flops / peak
    return dict(batch_size=config.batch_size, block_size=config.block_size, step_ms=step * 1e3,
                tok_s=tokens / step, mfu=mfu, peak_memory_bytes=bench.peak_memory(runtime))


# -- whole programs --------------------------------------------------------------------------------

def run_program(name, *arguments):
    """Seconds that a program of the repository takes. Its output goes to gpu.log."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / name, *arguments], cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}: see gpu.log")
    return time.perf_counter() - start


def first_command(device, toy):
    """The first command of README.md, with its data set made from this Python: seconds, loss."""
    small = []
    if toy:
        small = [f"--dataset={text_data()}", "--max_steps=10", "--eval_tokens=2048",
                 "--n_layer=1", "--compile=False"]
    else:
        prepare_default("python")
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_program("train.py", "config/gqa.py", f"--device={device}",
                              f"--out_dir={folder}/run", *small)
        rows = read_rows(f"{folder}/run/metrics.jsonl")
    speeds = [row["tokens_per_sec"] for row in rows if row["tokens_per_sec"]]
    return dict(steps=rows[-1]["step"], seconds=seconds, val_loss=rows[-1]["val_loss"],
                tok_s=statistics.median(speeds))


def compare(device, folder, toy, **settings):
    """Mean validation losses of compare.py, which goes on with what is in folder."""
    if toy:
        settings.update(dataset=text_data())
    folder = Path(folder).resolve()
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    seconds = run_program("compare.py", f"--device={device}", f"--out_dir={folder}", *arguments)
    records = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))["records"]
    losses = {}
    for record in records:
        losses.setdefault(record["variant"], []).append(record["val_loss"])
    means = [f"{variant} {statistics.mean(found):.3f}" for variant, found in losses.items()]
    return dict(seconds=seconds, parameters=records[0]["params"], losses=", ".join(means))
