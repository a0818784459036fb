"""A Llama-style decoder in one file that depends only on torch.

n_kv_head selects the attention: n_head is multi-head attention (MHA, Vaswani et al. 2017), 1 is
multi-query attention (MQA, Shazeer 2019, arXiv 1911.02150), and a divisor of n_head in between is
grouped-query attention (GQA, Ainslie et al. 2023, arXiv 2305.13245). A second class,
LatentAttention, adds multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434). window
shrinks the cache of both classes, kv_share and kv_tied that of the first.

nanogqa/cache.py holds what the layers cache while a text grows. nanogqa/fast.py replaces some
modules with faster ones; tests check that the results agree.

Dimension letters, used in every shape comment:
    B batch   T new tokens   S tokens attended to (cached and new)   V vocab_size
    C n_embd  H n_head       K n_kv_head                             D head_dim
"""
import hashlib
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# settings that belong to one kind of attention alone
SETTINGS_OF = {
    "gqa": ("n_kv_head", "qkv_bias", "rope_fraction", "kv_tied", "kv_share"),
    "mla": ("kv_lora_rank", "q_lora_rank", "rope_head_dim", "nope_head_dim", "v_head_dim"),
}


def require(condition, message):
    if not condition:
        raise ValueError(message)


@dataclass
class GPTConfig:
    settings_of = SETTINGS_OF  # not a field: nanogqa/configurator.py reads it
    # model
    block_size: int = 256  # longest context, in tokens
    vocab_size: int | None = None  # rows of the embedding table; None: the tokenizer's size
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # query heads
    n_kv_head: int | None = None  # key/value heads; None: n_head (MHA); 1: MQA; between them: GQA
    n_embd: int = 128  # width of the residual stream
    head_dim: int | None = None  # width of a head; None: n_embd / n_head
    n_ff: int | None = None  # width of the MLP; None: 8/3 n_embd, rounded up to a multiple of 32
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_factor: float = 1.0  # context extension as in Llama 3.1; 1 turns it off
    rope_original_block_size: int | None = None  # block_size before extension ("original" below)
    rope_low_freq_factor: float = 1.0  # wavelengths above original / this are stretched in full
    rope_high_freq_factor: float = 4.0  # those below original / this stay; between, interpolated
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm; 1e-6 for MLA's latents
    qk_norm: bool = True  # normalize queries and keys (Qwen3); MLA: its latents
    qkv_bias: bool = False  # biases on q_proj, k_proj and v_proj (Qwen2)
    rope_fraction: float = 1.0  # share of a head's pairs that RoPE rotates; 0: none (NoPE)
    kv_tied: bool = False  # values are the rotated keys, so that only keys are cached
    kv_share: int = 1  # layers of a kind (local, global) that share keys and values; 1: no sharing
    window: int | None = None  # tokens that a token attends to, itself included; None: all
    global_every: int = 0  # with a window: every n-th layer attends to all tokens; 0: none does
    attention: Literal["gqa", "mla"] = "gqa"  # gqa: MHA, GQA or MQA, by n_kv_head; mla: latents
    kv_lora_rank: int | None = None  # MLA: width of the latent; None: min(4 head_dim, n_embd / 2)
    q_lora_rank: int | None = None  # MLA: width of the queries' latent; None: not compressed
    rope_head_dim: int | None = None  # MLA: rotary part; None: max(head_dim / 2, min(head_dim, 32))
    nope_head_dim: int | None = None  # MLA: other part of a key; None: 1.5 head_dim - rope_head_dim
    v_head_dim: int | None = None  # MLA: width of a value; None: head_dim
    tie_embeddings: bool = True  # use the embedding table as the output head
    embed_std: float = 0.02  # standard deviation of the embedding table before training
    dropout: float = 0.0  # on the embedding and each sublayer's output, never on attention weights

    def __post_init__(self):
        """Sets defaults that follow from other settings. Raises ValueError if settings clash."""
        for field in fields(GPTConfig):
            name, value = field.name, getattr(self, field.name)
            if field.type in (int, int | None) and value is not None and name != "global_every":
                require(value >= 1, f"{name} must be at least 1, not {value}")
            if field.type is float and name not in ("dropout", "rope_fraction"):
                # far from the limits of float32
                require(1e-30 <= value <= 1e30, f"{name} must be from 1e-30 to 1e30, not {value}")
        require(self.n_layer <= 1024, f"n_layer must be at most 1024, not {self.n_layer}")
        H, C = self.n_head, self.n_embd
        self.n_kv_head = self.n_kv_head or H
        legal = [n for n in range(1, min(H, 1024) + 1) if H % n == 0]  # H may be huge
        require(H % self.n_kv_head == 0, f"n_kv_head={self.n_kv_head} does not divide n_head={H}: "
                f"choose one of {legal}")
        require(self.head_dim or C % H == 0,
                f"n_embd={C} is not a multiple of n_head={H}: change one of them, or set head_dim")
        self.head_dim = self.head_dim or C // H
        self.n_ff = self.n_ff or math.ceil(C * 8 / 3 / 32) * 32
        default = {field.name: field.default for field in fields(GPTConfig)} | {"n_kv_head": H}
        for kind in SETTINGS_OF:
            for name in SETTINGS_OF[kind]:
                value = getattr(self, name)
                require(kind == self.attention or value == default[name], f"{name}={value} is for "
                        f"attention={kind}: leave {name} out, or set attention={kind}")
        if self.attention == "mla":
            self.set_latents()
        rotary = {"gqa": "head_dim", "mla": "rope_head_dim"}[self.attention]
        require(getattr(self, rotary) % 2 == 0, f"{rotary}={getattr(self, rotary)} is odd, but "
                "RoPE rotates pairs: make it even")
        require(self.rope_factor >= 1, f"rope_factor must be at least 1, not {self.rope_factor}")
        require(0 < self.rope_low_freq_factor < self.rope_high_freq_factor,
                "rope_low_freq_factor must be above 0 and below rope_high_freq_factor")
        require(self.rope_factor == 1 or self.rope_original_block_size,
                "rope_factor needs rope_original_block_size, the context before the extension")
        require(0 <= self.rope_fraction <= 1,
                f"rope_fraction must be at least 0 and at most 1: {self.rope_fraction}")
        require(not self.rope_fraction or round(self.rope_fraction * getattr(self, rotary) / 2) > 0,
                f"rope_fraction={self.rope_fraction} of a head is less than a pair: raise it")
        require(0 <= self.global_every <= self.n_layer, "global_every must be from 0 to n_layer")
        require(self.window or not self.global_every, f"global_every={self.global_every} is for "
                "models with a window: set window, or leave global_every out")
        require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1: {self.dropout}")

    def set_latents(self):
        """Sets MLA's default widths. From 8 heads of width 64 upwards they are DeepSeek's
        proportions, which give narrower models a latent as wide as the residual stream and few
        rotary pairs: there, both had a higher loss (results/README.md)."""
        D = self.head_dim
        self.kv_lora_rank = self.kv_lora_rank or min(4 * D, (self.n_embd + 1) // 2)
        self.rope_head_dim = self.rope_head_dim or max(2, D // 4 * 2, min(D // 2 * 2, 32))
        self.nope_head_dim = self.nope_head_dim or max(1, 3 * D // 2 - self.rope_head_dim)
        self.v_head_dim = self.v_head_dim or D
        key_width = self.nope_head_dim + self.rope_head_dim
        require(self.v_head_dim <= key_width, f"v_head_dim={self.v_head_dim} is more than "
                f"nope_head_dim + rope_head_dim = {key_width}, the width of keys: lower it")

    def cache_specs(self):
        """The CacheSpec of each layer, from which cache.py and costs.py of nanogqa/ take sizes."""
        heads, widths = self.n_kv_head, (self.head_dim, self.head_dim)
        if self.kv_tied:
            widths = (self.head_dim,)
        if self.attention == "mla":
            heads, widths = 1, (self.kv_lora_rank + self.rope_head_dim,)
        specs = []
        seen = {self.window: 0, None: 0}  # local and global layers so far
        owner = {}  # {window: the last layer that caches its own keys and values}
        for i in range(self.n_layer):
            window = self.window
            if self.global_every and (i + 1) % self.global_every == 0:
                window = None
            source = None
            if seen[window] % self.kv_share == 0:
                owner[window] = i
            else:
                source = owner[window]
                specs[source].shared = True
            seen[window] += 1
            specs.append(CacheSpec(heads, widths, window, source))
        return specs


@dataclass
class CacheSpec:
    """What a layer reads from a cache: tensors (B, heads, S, width), one for each of widths."""
    heads: int
    widths: tuple[int, ...]  # keys and values; kv_tied: keys; MLA: latents
    window: int | None = None  # the last tokens that it reads; None: all
    source: int | None = None  # the layer below that caches them; None: the layer itself
    shared: bool = False  # whether layers above read them too


def rope_frequencies(config, device=None):
    """(D/2,) radians per position of each pair, float32 (RoPE, arXiv 2104.09864): theta^(-2i/n) for
    the pairs of n = rope_fraction D dimensions, and 0 for the others; D is rope_head_dim for MLA.
    With rope_factor, low frequencies are divided by it as in Llama 3.1's reference code."""
    D = config.rope_head_dim if config.attention == "mla" else config.head_dim
    n = 2 * round(config.rope_fraction * D / 2)
    exponent = torch.arange(0, n, 2, device=device, dtype=torch.float32) / n
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_factor != 1:
        turns = config.rope_original_block_size * frequency / (2 * math.pi)  # per original context
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / config.rope_factor)
    return F.pad(frequency, (0, (D - n) // 2))


def rope_cos_sin(positions, frequency):
    """(B, T) absolute positions -> cosines and signed sines for apply_rope, (B, 1, T, D) float32.
    Computed in every forward pass, since model.bfloat16() would round buffers."""
    angle = positions[:, None, :, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, cos, sin):
    """Rotates each pair (a, b) = (x[i], x[i + D/2]) of (B, heads, T, D), Hugging Face's half-split
    layout, to (a cos - b sin, b cos + a sin): rolling swaps the halves, sin carries the signs."""
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).to(x.dtype)


@dataclass
class Context:
    """What the layers of a forward pass share."""
    cos: torch.Tensor  # (1 or B, 1, T, D), for MLA (1 or B, 1, T, P): see rope_cos_sin
    sin: torch.Tensor  # the same shape, with the signs for apply_rope
    masks: dict  # {window: what attention_mask returns}
    cache: object  # a KVCache of nanogqa/cache.py, or None


def attention_mask(T, window, cache, device):
    """Returns a bool mask (1 or B, 1, T, S), True where a new token may attend to a key, or None if
    attend needs none: for T tokens that start unpadded rows and fit into the window, and for one
    token that sees every key. A static cache always has a mask.

    A token attends to itself and those before it; with a window, to the last `window` of these.
    """
    plain = cache is None or (not cache.static and cache.padding is None)
    if plain and T == 1:
        return None
    if plain and (cache is None or cache.length == 0) and (window is None or T <= window):
        return None  # the window reaches the first token
    if cache is None:
        places = keys = torch.arange(T, device=device)                  # (T,), (S,) with S = T
    else:
        places, keys = cache.places(T), cache.key_places(T, window)     # (T,), (S,)
    distance = places[:, None] - keys                                   # (T, S)
    mask = (distance >= 0) & (keys >= 0)
    if window is not None:
        mask = mask & (distance < window)
    mask = mask[None, None]                                             # (1, 1, T, S)
    if cache is not None and cache.padding is not None:
        # padding attends to nothing, for which scaled_dot_product_attention gives zeros, not NaN
        mask = mask & (keys >= cache.padding[:, None, None, None])      # (B, 1, T, S)
    return mask


def attend(q, k, v, mask=None, scale=None):
    """Attention of (B, H, T, D) queries over (B, K, S, D) keys and values -> (B, H, T, D).

    mask: see attention_mask; None: every key if T = 1, else causal with T = S. scale: None: D^-1/2.
    Query head h reads key/value head h // (H / K). With H = 8 and K = 2:

        query head       0 1 2 3  4 5 6 7
        key/value head   0 0 0 0  1 1 1 1

    Keys and values are not copied to H heads. For T > 1, enable_gqa is used where a fused kernel
    shares heads without a copy. Otherwise the H / K query heads that share a key/value head become
    rows of one matrix: any kernel accepts that, and for one token it is faster.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, norms return float32
    causal = mask is None and T > 1
    assert T == S or not causal, "is_causal is aligned to the top left: it needs T = S"
    half_on_cuda = q.device.type == "cuda" and q.dtype != torch.float32
    if T > 1 and (H == K or q.device.type == "cpu" or (causal and half_on_cuda)):
        return F.scaled_dot_product_attention(  # plain bools: T and H may be symbolic
            q, k, v, mask, is_causal=mask is None, scale=scale,
            enable_gqa=True if H != K else False)  # noqa: SIM210
    if causal:
        mask = q.new_ones(1, 1, T, S, dtype=torch.bool).tril()
    if mask is not None:
        mask = mask.repeat(1, 1, H // K, 1)                             # (1 or B, 1, H/K * T, S)
    q = q.reshape(B, K, H // K * T, D)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(B, H, T, -1)


def norm(width, eps, wanted=True):
    """RMSNorm (arXiv 1910.07467), or the identity if it is not wanted."""
    return nn.RMSNorm(width, eps) if wanted else nn.Identity()


class Attention(nn.Module):
    def __init__(self, config, index, spec):
        super().__init__()
        H, K, D, C = config.n_head, config.n_kv_head, config.head_dim, config.n_embd
        self.index, self.window = index, spec.window
        self.has_own_kv, self.returns_kv = spec.source is None, spec.shared
        self.head_dim, self.kv_tied = D, config.kv_tied
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        if self.has_own_kv:
            self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        if self.has_own_kv and not config.kv_tied:
            self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = norm(D, config.norm_eps, config.qk_norm)
        if self.has_own_kv:
            self.k_norm = norm(D, config.norm_eps, config.qk_norm)

    def forward(self, x, context, kv):
        """x: (B, T, C). kv: what keys_and_values gave in a layer below, for a layer without its
        own, else None. Returns (B, T, C), and kv if layers above read it, else None."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                # (B, T, H, D)
        q = apply_rope(self.q_norm(q).transpose(1, 2), context.cos, context.sin)
        if self.has_own_kv:
            kv = self.keys_and_values(x, context)
        k, v = kv[0], kv[-1]  # the same if they are tied
        y = attend(q, k, v, context.masks[self.window])                 # (B, H, T, D)
        if self.kv_tied:  # the query's own rotation is undone: values depend on the distance alone
            y = apply_rope(y, context.cos, -context.sin)
        y = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))            # (B, T, C)
        return y, (kv if self.returns_kv else None)

    def keys_and_values(self, x, context):
        """[k, v], or [k] if they are tied: (B, K, S, D) each, from the cache if there is one."""
        B, T, _ = x.shape
        k = self.k_proj(x).view(B, T, -1, self.head_dim)                # (B, T, K, D)
        kv = [apply_rope(self.k_norm(k).transpose(1, 2), context.cos, context.sin)]
        if not self.kv_tied:
            v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            kv.append(v.contiguous() if self.returns_kv else v)  # FSDP warns of returned views
        if context.cache is not None:
            kv = context.cache.append(self.index, *kv)                  # (B, K, S, D)
        return kv


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1 and appendix C). Its widths:

    R kv_lora_rank   P rope_head_dim   N nope_head_dim   U v_head_dim
    (d_c             d_h^R             d_h               d_h in the paper)

    Each token caches its latent c and one rotated key r for all heads. Head h has the key
    (A_h c, r) and the value B_h c, where A_h and B_h are its rows of kv_b_proj. expanded computes
    them: in training, at an unmasked start of a prompt, and for more than R new tokens. absorbed
    never does: q . A_h c = (A_h^T q) . c, and B_h is applied after the sum over tokens. So queries
    attend to the pairs (c, r), which are one key/value head of width R + P, as in MQA.
    """

    def __init__(self, config, index, spec):
        super().__init__()
        H, C, R, P = config.n_head, config.n_embd, config.kv_lora_rank, config.rope_head_dim
        N, U = config.nope_head_dim, config.v_head_dim
        self.index, self.window = index, spec.window
        self.widths, self.q_lora_rank = (R, P, N, U), config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(C, H * (N + P), bias=False)
        else:
            self.q_a_proj = nn.Linear(C, self.q_lora_rank, bias=False)
            self.q_a_norm = norm(self.q_lora_rank, 1e-6, config.qk_norm)  # DeepSeek's eps
            self.q_b_proj = nn.Linear(self.q_lora_rank, H * (N + P), bias=False)
        self.kv_a_proj = nn.Linear(C, R + P, bias=False)
        self.kv_a_norm = norm(R, 1e-6, config.qk_norm)
        self.kv_b_proj = nn.Linear(R, H * (N + U), bias=False)
        self.o_proj = nn.Linear(H * U, C, bias=False)

    def forward(self, x, context, kv):
        """As Attention.forward. Layers do not share latents: kv is unused, None is returned."""
        B, T, _ = x.shape
        R, P, N, U = self.widths
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.q_lora_rank else self.q_proj(x)
        q = q.view(B, T, -1, N + P).transpose(1, 2)                     # (B, H, T, N + P)
        q_nope, q_rope = q.split((N, P), dim=-1)                        # (B, H, T, N or P)
        q_rope = apply_rope(q_rope, context.cos, context.sin)
        c, r = self.kv_a_proj(x)[:, None].split((R, P), dim=-1)         # (B, 1, T, R or P)
        c, r = self.kv_a_norm(c), apply_rope(r, context.cos, context.sin)
        if context.cache is not None:
            [latent] = context.cache.append(self.index, torch.cat((c, r), -1))  # (B, 1, S, R + P)
            c, r = latent.split((R, P), dim=-1)                         # (B, 1, S, R or P)
        mask = context.masks[self.window]
        if context.cache is not None and T <= R and (T == 1 or mask is not None):
            y = self.absorbed(q_nope, q_rope, latent, mask)
        else:
            y = self.expanded(q_nope, q_rope, c, r, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), None   # (B, T, C)

    def expanded(self, q_nope, q_rope, c, r, mask):                     # -> (B, H, T, U)
        R, P, N, U = self.widths
        kv = self.kv_b_proj(c[:, 0]).view(len(c), c.size(2), -1, N + U)
        k, v = kv.transpose(1, 2).split((N, U), dim=-1)                 # (B, H, S, N), (B, H, S, U)
        k = torch.cat((k, r.expand(-1, k.size(1), -1, -1)), dim=-1)     # (B, H, S, N + P)
        # fused kernels require values as wide as keys: padding is 1.2 to 3.0 times as fast forward
        # on a CPU, 0.9 to 1.9 times with the gradient (results/latent_padding.py)
        v = F.pad(v, (0, N + P - U))
        return attend(torch.cat((q_nope, q_rope), dim=-1), k, v, mask)[..., :U]

    def absorbed(self, q_nope, q_rope, latent, mask):                   # -> (B, H, T, U)
        R, P, N, U = self.widths
        a, b = self.kv_b_proj.weight.view(-1, N + U, R).split((N, U), dim=1)  # (H, N or U, R)
        q = torch.cat((torch.einsum("bhtn,hnr->bhtr", q_nope, a), q_rope), dim=-1)
        # values are (c, r) too, as fused kernels require equal widths; r is cut off again
        y = attend(q, latent, latent, mask, scale=(N + P) ** -0.5)[..., :R]
        return torch.einsum("bhtr,hur->bhtu", y, b)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


ATTENTION = {"gqa": Attention, "mla": LatentAttention}


class Block(nn.Module):
    def __init__(self, config, index, spec):
        super().__init__()
        self.attn_norm = norm(config.n_embd, config.norm_eps)
        self.attn = ATTENTION[config.attention](config, index, spec)
        self.mlp_norm = norm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.attn_dropout, self.mlp_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x, context, kv):
        y, kv = self.attn(self.attn_norm(x), context, kv)
        x = x + self.attn_dropout(y)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x))), kv


class HeadLoss(nn.Module):
    """Cross-entropy in nats, summed over targets and divided by n_targets. x is (B, T, C), weight
    (V, C), targets (B, T), -1 for none. nanogqa/fast.py has a version that takes less memory."""

    def forward(self, x, weight, targets, n_targets):
        logits = F.linear(x, weight).float().flatten(0, 1)              # (B * T, V)
        total = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
        return total / n_targets


def initial_weight(name, shape, seed, embed_std):
    """The parameter of that name before training. Each matrix has a generator seeded by (seed,
    name), so it depends neither on other shapes nor on the number of ranks or the device."""
    if len(shape) == 1:  # biases begin at 0, norms at 1
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    std = embed_std if name == "embed.weight" else shape[1] ** -0.5
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


class GPT(nn.Module):
    def __init__(self, config, seed=1337):
        super().__init__()
        require(config.vocab_size, "vocab_size is None: set it to the tokenizer's number of ids")
        self.config = config
        self.recompute = False  # True: keep only the input of each block for the backward pass
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.cache_specs = config.cache_specs()
        self.layers = nn.ModuleList(Block(config, i, s) for i, s in enumerate(self.cache_specs))
        self.norm = norm(config.n_embd, config.norm_eps)
        untied = not config.tie_embeddings
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False) if untied else None
        self.head_loss = HeadLoss()
        if not self.embed.weight.is_meta:  # meta tensors have a shape and no values
            for name, parameter in self.named_parameters():
                parameter.data.copy_(initial_weight(name, parameter.shape, seed, config.embed_std))

    def forward(self, idx, targets=None, n_targets=None, cache=None, logits="all"):
        """(B, T) token ids -> (logits, loss).

        logits selects which to return: "all" (B, T, V), "last" (B, 1, V; not with targets), "none",
        or "targets" (n, V), those of the n positions with a target. loss (None without targets) is
        the sum over targets other than -1, divided by n_targets, by default their number. A
        micro-step passes the number of the whole step, so that losses add up to the step's mean.
        With a cache, the ids continue what it holds. Raises ValueError if they do not fit (a static
        cache: see KVCache.write_indices).
        """
        T = idx.size(1)
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
            positions = torch.arange(T, device=idx.device)[None]        # (1, T)
        else:
            positions = cache.positions(T)                              # (1 or B, T)
        cos, sin = rope_cos_sin(positions, rope_frequencies(self.config, idx.device))
        masks = {}
        for window in dict.fromkeys(spec.window for spec in self.cache_specs):
            masks[window] = attention_mask(T, window, cache, idx.device)
        context = Context(cos, sin, masks, cache)
        shared = {}  # {window: keys and values that layers above read}
        x = self.dropout(self.embed(idx))                               # (B, T, C)
        for block, spec in zip(self.layers, self.cache_specs, strict=True):
            kv = None if spec.source is None else shared[spec.window]
            if self.recompute and self.training:
                x, kv = checkpoint(block, x, context, kv, use_reentrant=False)
            else:
                x, kv = block(x, context, kv)
            if spec.shared:
                shared[spec.window] = kv
        if cache is not None:
            cache.length += T
        x = self.norm(x[:, -1:] if logits == "last" else x)
        loss = None
        if targets is not None:
            if n_targets is None:
                n_targets = (targets >= 0).sum().clamp(min=1)
            head = self.embed if self.lm_head is None else self.lm_head
            loss = self.head_loss(x, head.weight, targets, n_targets)
        if logits == "none":
            return None, loss
        if logits == "targets":
            x = x[targets >= 0]
        if self.lm_head is None:
            return F.linear(x, self.embed.weight), loss
        return self.lm_head(x), loss  # not F.linear: nanogqa/fast.py may have packed its weight
