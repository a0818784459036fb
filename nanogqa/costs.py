"""Everything that is calculated: parameters, FLOPs, bytes, and the peaks of devices.

Sizes of the cache follow from config.cache_specs(), what each layer caches, so that a change of
the cache is made in model.py alone.
"""
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from nanogqa.configurator import UserError, one_line

# peak dense bfloat16 FLOP/s by a part of the device's name (NVIDIA's data sheets)
PEAK_FLOPS = {"GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12,
              "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12}
OTHER_DEVICES = ("MIG", "Laptop", "4090 D")  # parts or relatives of these, with lower peaks
# peak memory bandwidth in bytes/s, likewise
PEAK_BANDWIDTH = {"GH200": 4.0e12, "H200": 4.8e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12,
                  "H100": 3.35e12, "A100-SXM4-80GB": 2.04e12, "A100 80GB PCIe": 1.94e12,
                  "A100": 1.56e12}
GPU_MEMORY = {"H100": 80e9, "H200": 141e9}  # bytes (NVIDIA's data sheets)
LIBRARIES = 96 * 2**20  # bytes of the buffers of PyTorch, MKL and oneDNN, and gaps in the heap
CONTEXT = 4096  # tokens for which compare.py gives the size of a cache
# the settings that a model's number of parameters comes from
SIZE_SETTINGS = "n_layer, n_embd, n_ff, vocab_size or the widths of heads and latents"


# -- one model -------------------------------------------------------------------------------------

def num_params(model, embedding=True):
    """Number of parameters; embedding=False leaves out the embedding table and an untied head."""
    total = sum(p.numel() for p in model.parameters())
    if embedding:
        return total
    total -= model.embed.weight.numel()
    if model.lm_head is not None:
        total -= model.lm_head.weight.numel()
    return total


class NoInit(TorchFunctionMode):
    """Leaves out the initial values of torch.nn, which GPT replaces by its own. For a model without
    values, PyTorch would import its compiler to draw them, which takes long."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def meta_model(GPT, config):
    """GPT(config) on the meta device: shapes without values. Raises UserError if a size does not
    fit into 64 bits."""
    try:
        with torch.device("meta"), NoInit():
            return GPT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise UserError(f"a model of this size cannot be created anywhere ({one_line(error, 100)}):"
                        f" lower {SIZE_SETTINGS}") from None


def count_params(GPT, config):
    """num_params(GPT(config)) without its values."""
    return num_params(meta_model(GPT, config))


def flops_per_token(model, T=None):
    """Training FLOPs, forward and backward, for one token of a T-token sequence (None: block_size).

    6 per weight of a matrix product and 12 H D T for attention in each layer, the causal half not
    subtracted (PaLM, arXiv 2204.02311, appendix B); T is at most the layer's window. n_kv_head
    changes the first term only. For MLA, D is the mean width of an expanded key and value.
    """
    config = model.config
    T = T or config.block_size
    products = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if model.lm_head is not None:
        products -= model.embed.weight.numel()  # a lookup, not a product
    key_and_value = 2 * config.head_dim
    if config.attention == "mla":
        key_and_value = config.nope_head_dim + config.rope_head_dim + config.v_head_dim
    read = sum(tokens_read(spec, T) for spec in config.cache_specs())
    return 6 * products + 6 * config.n_head * key_and_value * read


def tokens_read(spec, tokens):
    """Tokens that a layer, given by its CacheSpec, reads of a sequence: at most its window."""
    return min(tokens, spec.window or tokens)


def numbers_read(spec, tokens):
    """Numbers that a layer reads of one sequence of that many tokens."""
    return spec.heads * sum(spec.widths) * tokens_read(spec, tokens)


def kv_cache_bytes(config, tokens, dtype=torch.float32):
    """Bytes that the layers cache for one sequence of that many tokens."""
    own = [spec for spec in config.cache_specs() if spec.source is None]
    return sum(numbers_read(spec, tokens) for spec in own) * dtype.itemsize


def kv_bytes_per_token(config, dtype=torch.float32):
    """Bytes that the cache holds for one token: see GPTConfig.cache_specs."""
    return kv_cache_bytes(config, 1, dtype)


def kv_bytes_beyond_windows(config, dtype=torch.float32):
    """Bytes by which the cache grows with a token once the layers with a window are full."""
    full = max(spec.window or 0 for spec in config.cache_specs())
    return kv_cache_bytes(config, full + 1, dtype) - kv_cache_bytes(config, full, dtype)


# -- decoding --------------------------------------------------------------------------------------

@dataclass
class Decoding:
    """What generating text depends on, beside the model."""
    batch_size: int
    prompt_len: int
    max_length: int  # tokens that the cache has room for
    dtype: torch.dtype = torch.float32
    packed: bool = False  # weights in oneDNN's layout: see nanogqa/fast.py
    static: bool = False  # a cache for torch.compile
    padded: bool = False  # rows of different length
    folded: bool = False  # prompts on a GPU: see mask_bytes


def cache_length(config, prompts, max_new_tokens):
    """Tokens that the cache needs room for to continue prompts, lists of ids, as one batch."""
    return min(config.block_size, max(map(len, prompts)) + max_new_tokens)


def prefill_chunk(batch_size, prompt_len, masked, static):
    """(rows, tokens) of each forward pass of sample.prefill: at most 2,048 tokens in all, unless a
    single row has more. A prompt of up to 4,096 tokens is one part, since only the start of a text
    needs no mask. Longer prompts, and those with masks, of padded rows or windows, are read 1,024
    tokens at a time. With a static cache, every part has all rows, so that one graph serves all."""
    if static:
        return batch_size, min(prompt_len, max(1, 2048 // batch_size))
    tokens = prompt_len
    if masked or prompt_len > 4096:
        tokens = min(1024, prompt_len)
    return max(1, min(batch_size, 2048 // tokens)), tokens


def bytes_per_step(model, batch_size, tokens, dtype):
    """Bytes that a decoding step has to read: the weights once, and the cache of every row, again
    in each layer that reads it."""
    weights = num_params(model)
    if model.lm_head is not None:
        weights -= model.embed.weight.numel()  # each row reads one line of the table
    numbers = sum(numbers_read(spec, tokens) for spec in model.config.cache_specs())
    return (weights + batch_size * numbers) * dtype.itemsize


def decoding_bytes(model, decoding):
    """An upper bound of what decoding holds, in bytes, as a dict: weights, cache, logits, prefill
    and libraries.

    Call it, like bytes_per_step, before prepare_for_decoding: packed weights are not parameters.
    logits are one row per sequence; prefill is what the largest part of the prompt takes beside the
    cache: see numbers_per_token and mask_bytes. What drawing a token takes is not counted. The
    tests compare this with what is allocated.
    """
    config, size = model.config, decoding.dtype.itemsize
    weights = num_params(model)
    if decoding.packed and model.lm_head is None:
        weights += model.embed.weight.numel()  # a tied table is held in both layouts
    cache = kv_cache_bytes(config, decoding.max_length, decoding.dtype)
    masked = decoding.padded or any(in_ring(spec, decoding) for spec in config.cache_specs())
    rows, tokens = prefill_chunk(
        decoding.batch_size, decoding.prompt_len, masked, decoding.static)
    at_once = max(rows * tokens, decoding.batch_size)  # of a part of the prompt, or a step
    activations = at_once * numbers_per_token(config) * size
    activations += rows * copied_numbers(config, decoding, tokens) * size
    activations += rows * expanded_numbers(config, decoding, tokens) * size
    return dict(
        weights=weights * size,
        cache=decoding.batch_size * cache,
        logits=decoding.batch_size * config.vocab_size * size,
        prefill=activations + mask_bytes(config, decoding, rows, tokens),
        libraries=LIBRARIES,
    )


def numbers_per_token(config):
    """Most numbers that live at once for each token of a part of the prompt.

    The residual stream, its norm and one more take 3 C. Then follow either 4 F of the MLP, or the
    heads: 7 H D of queries and twice what is cached, as they are normed and rotated. For MLA, in
    the letters of LatentAttention: 2 (R + P) of latents, and 8 H (N + P) where they are expanded,
    H (3 (R + P) + 2 (N + P)) where they are absorbed.
    """
    H = config.n_head
    cached = max(spec.heads * sum(spec.widths) for spec in config.cache_specs())
    heads = 7 * H * config.head_dim + 2 * cached
    if config.attention == "mla":
        key = config.nope_head_dim + config.rope_head_dim
        latent = config.kv_lora_rank + config.rope_head_dim
        heads = 2 * latent + H * max(8 * key, 3 * latent + 2 * key)
    return 3 * config.n_embd + max(4 * config.n_ff, heads)


def in_ring(spec, decoding):
    """Whether the cache of a layer has room for its window alone."""
    return spec.window is not None and spec.window < decoding.max_length


def masked_keys(spec, decoding, tokens):
    """Keys that the last part of a prompt, of `tokens` tokens, attends to under a mask in a layer.
    0 if that part needs no mask: numbers_per_token counts its keys then."""
    ring = in_ring(spec, decoding)
    plain = not decoding.static and not decoding.padded
    in_reach = not ring or decoding.prompt_len <= spec.window
    if plain and in_reach and decoding.prompt_len <= tokens:  # the prompt is one part
        return 0
    if ring:
        return spec.window + tokens  # what is kept, and the part
    if decoding.static:
        return decoding.max_length
    return decoding.prompt_len


def copied_numbers(config, decoding, tokens):
    """Most numbers for each row that copies from rings hold at once, for a part of a prompt: the
    copy of a layer, and that of the one below, which is not freed yet."""
    copied = [0]
    for spec in config.cache_specs():
        if in_ring(spec, decoding):
            read = masked_keys(spec, decoding, tokens)
            copied.append(2 * spec.heads * sum(spec.widths) * read)
    return max(copied)


def expanded_numbers(config, decoding, tokens):
    """Numbers of the keys and values that MLA expands from the cache for each row of a part."""
    if config.attention != "mla" or tokens <= config.kv_lora_rank:
        return 0
    key = config.nope_head_dim + config.rope_head_dim
    read = max(masked_keys(spec, decoding, tokens) for spec in config.cache_specs())
    return read * config.n_head * 4 * key


def mask_bytes(config, decoding, rows, tokens):
    """Bytes of the masks of a part of the prompt, (rows, tokens), or of a step, if that is more:
    one for each window.

    While a mask is made, two bool tensors of (T, S) exist at once. Attention adds two bool ones and
    one of numbers. Padded rows each have their own. model.attend repeats a mask H / K times where
    queries that share a head become rows of one matrix: in steps, and in prompts on a GPU.
    """
    windows = {spec.window: spec for spec in config.cache_specs()}
    entry = 2 + decoding.dtype.itemsize  # bytes in attention: two bools and a number
    step, prompt = 0, 0
    for spec in windows.values():
        S = masked_keys(spec, decoding, tokens)
        repeated = config.n_head // spec.heads * entry
        if decoding.padded or decoding.static:  # other steps need no mask
            step += tokens_read(spec, decoding.max_length) * (2 + repeated)
        if decoding.folded:
            prompt += tokens * S * (2 + repeated)
        else:
            prompt += tokens * S * (2 + entry)
    if decoding.padded:
        return max(decoding.batch_size * step, rows * prompt)
    return max(step, prompt)


def decoding_floor(config, params, decoding, settings):
    """{settings to lower: bytes} for check_memory of runtime.py: what decoding holds at least.
    settings names those that its numbers of rows and tokens come from."""
    row = kv_cache_bytes(config, decoding.max_length, decoding.dtype)
    row += config.vocab_size * decoding.dtype.itemsize
    return {SIZE_SETTINGS: params * decoding.dtype.itemsize, settings: decoding.batch_size * row}


def peak_of(table, device):
    """The entry of PEAK_FLOPS or PEAK_BANDWIDTH for a CUDA device; None where it is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if any(part in name for part in OTHER_DEVICES):
            return None
        for part, peak in table.items():
            if part in name:
                return peak
    return None


def mfu(tokens_per_sec, model, runtime):
    """Model FLOPs utilization of all ranks; None where the rate or the device's peak is unknown."""
    peak = peak_of(PEAK_FLOPS, runtime.device)
    if tokens_per_sec is None or peak is None or runtime.dtype != torch.bfloat16:
        return None
    return tokens_per_sec * flops_per_token(model) / (peak * runtime.ranks)


# -- training on one device ------------------------------------------------------------------------

def training_floor(config, params, tokens, ranks, steps):
    """A lower bound of the bytes that a rank of train.py holds at once, as check_memory of
    runtime.py takes it: weights and the data of a step.

    If steps > 0, it adds the larger of two: the blocks' inputs for the tokens of a forward pass, or
    gradients and moments (Muon's are half of AdamW's). With trainable, neither is counted.
    """
    if config.parallel == "fsdp":
        params = params / ranks
    floor = {SIZE_SETTINGS: 4 * params, "tokens_per_step": 8 * config.tokens_per_step / ranks}
    if steps > 0 and not config.trainable:
        inputs = 2 * config.n_layer * config.n_embd * tokens
        states = 12 * params
        if config.optimizer == "muon":
            states = 8 * params
        if inputs < states:
            floor[SIZE_SETTINGS] += states
        elif config.batch_size is None:
            floor["tokens_per_step, or set batch_size"] = inputs
        else:
            floor["batch_size or block_size"] = inputs
    return floor


# -- training on many GPUs -------------------------------------------------------------------------
# docs/scale.md, which bench.py prints, states the assumptions.

GPUS_PER_NODE = 8
NVLINK = 450e9  # bytes/s one way of each GPU inside a node
NETWORK = 50e9  # bytes/s one way of each GPU out of its node (400 Gb/s)
ASSUMED_MFU = 0.4  # share of the peak FLOP/s while computing
USABLE = 0.9  # share of a GPU's memory: the rest is for CUDA itself, gaps and temporary buffers


def state_bytes(model, gpus, sharded):
    """Bytes on each GPU that do not grow with the batch: weights, gradients and AdamW's moments.

    16 per parameter in float32 and 2 of autocast's bfloat16 copies. Sharded, each GPU holds its
    share of the 16 and, gathered, 6 for each parameter of the tables and of two blocks.
    """
    total, blocks = num_params(model), num_params(model, embedding=False)
    if not sharded or gpus == 1:
        return 18 * total
    return 16 * total / gpus + 6 * (total - blocks + 2 * blocks / model.config.n_layer)


def activation_bytes(config, tokens, recompute=False):
    """Bytes that the backward pass of that many tokens needs on one GPU: see docs/scale.md."""
    C = config.n_embd
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    block = 18 * C + 4 * (q + kv) + 8 * config.n_ff + 4 * config.n_head
    if config.qk_norm:
        block += 4 * (q + kv)
    kept = block * config.n_layer
    if recompute:
        kept = 4 * C * config.n_layer + block
    logits = config.vocab_size * min(tokens, 2**28 // config.vocab_size)
    return tokens * (kept + 12 * C) + 10 * logits


def sent_bytes(params, gpus, sharded, micro_steps=1):
    """Bytes that each GPU sends in a step. DDP all-reduces float32 gradients once; FSDP gathers
    bfloat16 weights twice and reduce-scatters float32 gradients in every micro-step."""
    per_param = 2 * 4
    if sharded:
        per_param = (2 + 2 + 4) * micro_steps
    return params * (gpus - 1) / gpus * per_param


def scale(config, model, gpus, sharded):
    """What a training step takes on each GPU, as a dict: memory without and with recomputing
    (bytes), bytes sent, seconds of computing and of sending, and the tokens of all GPUs.

    config has tokens_per_step and batch_size.
    """
    sequences = max(1, config.tokens_per_step // config.block_size // gpus)
    batch = min(config.batch_size, sequences)
    state, tokens = state_bytes(model, gpus, sharded), sequences * config.block_size
    sent = sent_bytes(num_params(model), gpus, sharded, sequences // batch)
    link = NVLINK
    if gpus > GPUS_PER_NODE:
        link = min(NVLINK, GPUS_PER_NODE * NETWORK)
    at_once = batch * config.block_size
    return dict(
        memory=state + activation_bytes(config, at_once),
        recomputing=state + activation_bytes(config, at_once, recompute=True),
        sent=sent,
        tokens=tokens * gpus,
        compute_s=tokens * flops_per_token(model) / PEAK_FLOPS["H100"] / ASSUMED_MFU,
        communication_s=sent / link,
    )


@dataclass
class Rates:
    """Tokens per second of all GPUs."""
    worst: float  # computing waits for sending
    best: float  # sending hides behind computing
    recomputing: bool  # the step fits only with recomputing


def scale_rates(step, memory):
    """The Rates of a step from scale() on GPUs with that many bytes; None where it does not fit."""
    if min(step["memory"], step["recomputing"]) > USABLE * memory:
        return None
    recomputing = step["memory"] > USABLE * memory
    compute, communication = step["compute_s"], step["communication_s"]
    if recomputing:
        compute *= 4 / 3  # a second forward pass, which is a third of a step
    worst = step["tokens"] / (compute + communication)
    best = step["tokens"] / max(compute, communication)
    return Rates(worst, best, recomputing)
