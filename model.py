"""A Llama-shaped decoder in one file, whose key/value heads are one number: n_kv_head.

n_kv_head = n_head is multi-head attention (MHA), 1 is multi-query attention (MQA, Shazeer 2019, arXiv 1911.02150)
and anything between is grouped-query attention (GQA, Ainslie et al. 2023, arXiv 2305.13245). The fourth answer to the
same cache, multi-head latent attention (MLA), is a class of its own, LatentAttention, for attention = "mla".

Dimension letters, used in every shape comment:
    B batch   T new tokens   S tokens attended to (cached ones and the new)   V vocab_size
    C n_embd  H n_head       K n_kv_head                                      D head_dim
"""
import copy
import hashlib
import math
import platform
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LATENT = ("kv_lora_rank", "q_lora_rank", "rope_head_dim", "nope_head_dim", "v_head_dim")  # settings of attention = "mla" alone


@dataclass
class GPTConfig:
    block_size: int = 256         # longest context, in tokens
    vocab_size: int | None = None  # rows of the embedding table; None: as many as the data set's tokenizer has ids
    n_layer: int = 4              # transformer blocks
    n_head: int = 4               # query heads
    n_kv_head: int | None = None  # key/value heads: None is n_head (MHA), 1 is MQA, a divisor of n_head between is GQA
    n_embd: int = 128             # width of the residual stream
    head_dim: int | None = None   # width of a head; None: n_embd / n_head
    n_ff: int | None = None       # hidden width of the MLP; None: 8/3 n_embd, rounded up to a multiple of 32
    rope_theta: float = 10000.0   # base of the rotary wavelengths
    rope_factor: float = 1.0      # above 1: stretches the long wavelengths by it, as Llama 3.1 does
    rope_low_freq_factor: float = 1.0   # with it: wavelengths over rope_original_block_size / this are stretched in full,
    rope_high_freq_factor: float = 4.0  # those under rope_original_block_size / this stay, between there is a ramp
    rope_original_block_size: int | None = None  # block_size before the stretching
    norm_eps: float = 1e-5        # added to the mean square in RMSNorm
    qk_norm: bool = True          # RMSNorm on every query and key head, as in Qwen3; without it a Llama. mla: on its latents
    qkv_bias: bool = False        # biases on q_proj, k_proj and v_proj, as in Qwen2
    attention: Literal["gqa", "mla"] = "gqa"  # mla: a latent in place of keys and values, as in DeepSeek-V2
    kv_lora_rank: int | None = None   # mla: width of that latent; None: 4 head_dim, or half of n_embd where that is less
    q_lora_rank: int | None = None    # mla: width of a latent of the queries, which is not cached; None: no such latent
    rope_head_dim: int | None = None  # mla: the part of a query and key that RoPE turns; None: head_dim / 2, at least 32 of it
    nope_head_dim: int | None = None  # mla: the part that it does not turn; None: what is missing to 3/2 head_dim
    v_head_dim: int | None = None     # mla: width of a value; None: head_dim
    tie_embeddings: bool = True   # the embedding table is also the output head
    dropout: float = 0.0          # on the embedding and on what each block adds; never on attention weights

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ff",
                     "rope_original_block_size", *LATENT):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_head % self.n_kv_head:
            legal = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}: choose one of {legal}")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: change one of them, "
                                 "or set head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim % 2 and self.attention == "gqa":
            raise ValueError(f"head_dim={self.head_dim} is odd, and RoPE turns pairs: make it even")
        if self.attention == "mla":
            if self.n_kv_head != self.n_head or self.qkv_bias:
                name = "qkv_bias" if self.qkv_bias else "n_kv_head"
                raise ValueError(f"{name}={getattr(self, name)} is for attention=gqa: leave it out, mla has no such thing")
            # DeepSeek's proportions from heads of 64 and 8 of them on; below, a latent would be as wide as the stream, and RoPE
            # have too few pairs to tell places apart (results/README.md)
            D = self.head_dim
            rope = self.rope_head_dim or max(2, D // 4 * 2, min(D // 2 * 2, 32))
            for name, default in zip(LATENT, (min(4 * D, (self.n_embd + 1) // 2), None, rope, max(1, 3 * D // 2 - rope), D)):
                if getattr(self, name) is None:
                    setattr(self, name, default)
            if self.rope_head_dim % 2:
                raise ValueError(f"rope_head_dim={self.rope_head_dim} is odd, and RoPE turns pairs: make it even")
            if self.v_head_dim > self.nope_head_dim + self.rope_head_dim:
                raise ValueError(f"v_head_dim={self.v_head_dim} is more than nope_head_dim + rope_head_dim = "
                                 f"{self.nope_head_dim + self.rope_head_dim}, the width of keys: lower it")
        elif given := [name for name in LATENT if getattr(self, name) is not None]:
            raise ValueError(f"{given[0]} is for attention=mla: set that too, or leave {given[0]} out")
        if self.n_ff is None:
            self.n_ff = math.ceil(self.n_embd * 8 / 3 / 32) * 32
        for name in ("rope_theta", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.rope_factor < 1 or not 0 < self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise ValueError(f"rope_factor={self.rope_factor}, rope_low_freq_factor={self.rope_low_freq_factor}, "
                             f"rope_high_freq_factor={self.rope_high_freq_factor}: the first is 1 or more, the second is above 0 "
                             "and below the third")
        if self.rope_factor > 1 and self.rope_original_block_size is None:
            raise ValueError("rope_factor needs rope_original_block_size, the context that the wavelengths were made for")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def cached(self):
        """(tensors, heads, width) that the cache holds for one token of a layer: keys and values, or with mla one latent."""
        mla = self.attention == "mla"
        return (1, 1, self.kv_lora_rank + self.rope_head_dim) if mla else (2, self.n_kv_head, self.head_dim)

    @property
    def heads(self):
        """The numbers that decide the cache, in words: to print."""
        rank = f"kv_lora_rank {self.kv_lora_rank}, rope_head_dim {self.rope_head_dim}"
        return f"n_head {self.n_head}, {rank if self.attention == 'mla' else f'n_kv_head {self.n_kv_head}'}"


def rope_frequencies(config, device=None):
    """(D/2,) radians per position of each pair, float32: theta^(-2i/D) (Su et al. 2021, arXiv 2104.09864).

    With rope_factor, low frequencies are divided by it as in Llama 3.1 (its reference code, apply_scaling): turns is how often
    a pair goes round within rope_original_block_size.
    """
    D = config.rope_head_dim if config.attention == "mla" else config.head_dim
    exponent = torch.arange(0, D, 2, device=device, dtype=torch.float32) / D
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_factor == 1:
        return frequency
    turns = config.rope_original_block_size * frequency / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / config.rope_factor)


def rope_cos_sin(positions, frequency):
    """(B, T) absolute positions -> cos and signed sin of their angles for apply_rope, each (B, 1, T, D) in float32.

    Computed once per forward from the positions, so there is no buffer that model.bfloat16() could round: in bfloat16
    position 257 is position 256.
    """
    angle = positions[:, None, :, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]) of (B, heads, T, D) by its angle: the half-split convention of Hugging Face.

    (a, b) becomes (a cos - b sin, b cos + a sin): rolling by D/2 swaps the halves, and sin brings the signs.
    """
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of all layers, for at most max_length tokens in each of batch_size rows.

    Allocated by the caller and passed to GPT.forward; the model keeps no state between calls. It holds n_kv_head
    heads and never n_head; with mla one latent, as keys, and no values. It owns the position: GPT.forward asks where the new
    tokens stand, each layer appends its keys and values there, and GPT.forward advances once after the last layer.

    Rows of different length end together: padding, (batch_size,), says how many of the first tokens of each row are
    fillers, which nothing looks at. Tokens are written at the same place in all rows, positions count from the first
    real one.

    A static cache is for torch.compile: its length is a tensor, and attention reads all max_length places under a mask,
    so that no shape or address changes from token to token: one graph serves every step, and CUDA can replay it.
    """

    def __init__(self, config, batch_size, max_length, device=None, dtype=None, padding=None, static=False):
        if not 1 <= max_length <= config.block_size:
            raise ValueError(f"a cache of {max_length} tokens: it must be 1 to block_size={config.block_size}")
        tensors, heads, width = config.cached
        shape = (batch_size, heads, max_length, width)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer if tensors == 2 else 0)]
        self.max_length, self.padding, self.static = max_length, padding, static
        # tokens held, fillers included, the same in every row
        self.length = torch.zeros((), dtype=torch.long, device=device) if static else 0
        self.keep_addresses()

    def keep_addresses(self):
        """Tells torch.compile that a static cache stays where it is: CUDA graphs refuse inputs that change otherwise."""
        for x in (*self.k, *self.v, self.length) if self.static else ():
            torch._dynamo.mark_static_address(x, guard=False)

    @property
    def nbytes(self):
        return sum(x.nbytes for x in (*self.k, *self.v))

    def places(self, T):
        """Where the next T tokens are written, (T,)."""
        return self.length + torch.arange(T, device=self.k[0].device)

    def positions(self, T):
        """Absolute positions of the next T tokens, (B, T). ValueError where they would not fit."""
        if not self.static and self.length + T > self.max_length:
            # a slice assignment past the end would drop the tokens without a word; the index_copy_ of a static cache fails
            raise ValueError(f"the cache holds {self.length} of at most {self.max_length} tokens: {T} more do not fit")
        places = self.places(T).expand(self.k[0].size(0), T)
        return places if self.padding is None else (places - self.padding[:, None]).clamp(min=0)

    def mask(self, T):
        """Which of the S tokens each of the T new ones may see, (1 or B, T, S) bool; None: all up to itself."""
        if self.padding is None and not self.static and (T == 1 or self.length == 0):
            return None  # one token sees all, a first chunk is plainly causal
        S = self.max_length if self.static else self.length + T
        places = torch.arange(S, device=self.k[0].device)
        mask = (self.places(T)[:, None] >= places)[None]
        return mask if self.padding is None else mask & (places >= self.padding[:, None, None])

    def append(self, layer, k, v=None):
        """Writes the new (B, K, T, D) keys and values of a layer; returns all that attention reads, (B, K, S, D)."""
        return self.write(self.k[layer], k), None if v is None else self.write(self.v[layer], v)

    def write(self, kept, new):
        if self.static:
            return kept.index_copy_(2, self.places(new.size(2)), new)
        end = self.length + new.size(2)
        kept[:, :, self.length:end] = new
        return kept[:, :, :end]

    def advance(self, T):
        self.length += T

    def rewind(self, length):
        """Forgets all but the first length tokens."""
        self.length += length - self.length

    def rows(self, index):
        """A cache of the rows that index, a list, names: one prefilled prompt repeated for samples, or those not finished."""
        index = torch.tensor(index, device=self.k[0].device)
        other = copy.copy(self)
        other.k, other.v = [x[index] for x in self.k], [x[index] for x in self.v]
        other.padding = None if self.padding is None else self.padding[index]
        other.length = self.length + 0  # a tensor of its own where it is one
        other.keep_addresses()
        return other


def fused_causal(device, dtype, repeats):
    """Whether a fused causal kernel reads each key/value head for all of its queries. Elsewhere enable_gqa makes the copy."""
    return repeats == 1 or device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32)


def attention_route(config, device, dtype):
    """How attend runs, in words: to print once."""
    if config.attention == "mla":
        return "expanded to all heads where nothing is cached and no mask is needed, else over the latents"
    native = fused_causal(device, dtype, config.n_head // config.n_kv_head)
    return f"{'native' if native else 'folded'} over prompts, folded while decoding"


def attend(q, k, v, mask=None, scale=None):
    """Attention of (B, H, T, D) queries over (B, K, S, D) keys and values -> (B, H, T, D).

    mask is (B, T, S), True where a token may look; None means causal where T = S and everything where T = 1.
    scale multiplies q k; None: D^-1/2.
    Query head h reads key/value head h // (H / K). With H = 8 and K = 2:

        query head       0 1 2 3  4 5 6 7
        key/value head   0 0 0 0  1 1 1 1

    K and V are never copied out to H heads, by one of two routes:
    native  for training and prefill, where fused_causal says that there is a kernel and no mask is needed.
    folded  for decoding and for the rest: the H / K queries that share a head become rows of one query matrix, so
            that any kernel can run it. On CPU this is also the fastest way to decode.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if mask is None and T > 1 and fused_causal(q.device, q.dtype, H // K):
        # is_causal is aligned to the top left: right only for square T = S, so a warm cache must bring a mask
        assert T == S, (T, S)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != K)
    if mask is None and T > 1:
        mask = torch.ones(1, T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        mask = mask[:, None].repeat(1, 1, H // K, 1)                   # (B, 1, H/K * T, S)
    q = q.reshape(B, K, H // K * T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        H, K, D, C = config.n_head, config.n_kv_head, config.head_dim, config.n_embd
        self.layer, self.head_dim = layer, D
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache, mask):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)                # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q = apply_rope(self.q_norm(q).transpose(1, 2), cos, sin)        # (B, H, T, D)
        k = apply_rope(self.k_norm(k).transpose(1, 2), cos, sin)        # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                       # (B, K, S, D)
        y = attend(q, k, v, mask)                                       # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))         # (B, T, C)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C). Widths, beside those above:

    R kv_lora_rank   P rope_head_dim   N nope_head_dim   U v_head_dim        (d_c, d_h^R, d_h and d_h there)

    All that is cached of a token is its latent c and one key that RoPE turned, r. Head h has the key (A_h c, r) and the
    value B_h c, where A_h and B_h are its rows of kv_b_proj. Two ways to the same numbers:
    expanded  makes keys and values of every head: where new tokens see only each other and no mask is needed, as in training.
    absorbed  looks into a cache without making them. Since q A_h c = (A_h^T q) c, and B_h stands behind the sum over
              tokens, every query goes over the (c, r) themselves: one shared head as in MQA, R + P wide.
    """

    def __init__(self, config, layer):
        super().__init__()
        H, C, R, P, N, U = (config.n_head, config.n_embd, config.kv_lora_rank, config.rope_head_dim, config.nope_head_dim,
                            config.v_head_dim)
        norm = (lambda n: RMSNorm(n, 1e-6)) if config.qk_norm else lambda n: nn.Identity()  # DeepSeek's, whatever norm_eps is
        self.layer, self.widths, self.q_lora_rank = layer, (R, P, N, U), config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = Linear(C, H * (N + P), bias=False)
        else:
            self.q_a_proj, self.q_a_norm = Linear(C, self.q_lora_rank, bias=False), norm(self.q_lora_rank)
            self.q_b_proj = Linear(self.q_lora_rank, H * (N + P), bias=False)
        self.kv_a_proj, self.kv_a_norm = Linear(C, R + P, bias=False), norm(R)
        self.kv_b_proj = Linear(R, H * (N + U), bias=False)
        self.o_proj = Linear(H * U, C, bias=False)

    def forward(self, x, cos, sin, cache, mask):
        B, T, C = x.shape
        R, P, N, U = self.widths
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q, q_rope = q.view(B, T, -1, N + P).transpose(1, 2).split((N, P), -1)  # (B, H, T, N) and (B, H, T, P)
        c, r = self.kv_a_proj(x)[:, None].split((R, P), -1)             # (B, 1, T, R) and (B, 1, T, P)
        q_rope, c, r = apply_rope(q_rope, cos, sin), self.kv_a_norm(c), apply_rope(r, cos, sin)
        if cache is not None:
            latent, _ = cache.append(self.layer, torch.cat((c, r), -1))  # (B, 1, S, R + P)
        if cache is None or (mask is None and T > 1):                   # expanded
            k, v = self.kv_b_proj(c[:, 0]).view(B, T, -1, N + U).transpose(1, 2).split((N, U), -1)
            k = torch.cat((k, r.expand(-1, k.size(1), -1, -1)), -1)     # (B, H, T, N + P)
            # values as wide as keys, or fused kernels refuse: without them a CPU takes 1.2 to 3.0 x as long forward, 0.9 to
            # 1.9 x with the gradient (results/latent_padding.py)
            y = attend(torch.cat((q, q_rope), -1), k, F.pad(v, (0, N + P - U)))[..., :U]
        else:                                                           # absorbed
            a, b = self.kv_b_proj.weight.view(-1, N + U, R).split((N, U), 1)  # (H, N, R) and (H, U, R)
            q = torch.cat((torch.einsum("bhtn,hnr->bhtr", q, a), q_rope), -1)  # (B, H, T, R + P)
            y = attend(q, latent, latent, mask, scale=(N + P) ** -0.5)[..., :R]  # r as values too: fused, and cut off
            y = torch.einsum("bhtr,hur->bhtu", y, b)                    # (B, H, T, U)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))         # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_ff, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_ff, bias=False)
        self.down_proj = Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = (LatentAttention if config.attention == "mla" else Attention)(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache, mask):
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin, cache, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def initial_weight(name, shape, seed):
    """The parameter of that name at the start: each matrix from a generator of its own, seeded by (seed, name), so that
    models that differ in one shape start from the same values everywhere else, on any number of ranks and any device."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    std = 0.02 if name == "embed.weight" else shape[1] ** -0.5  # of the shape alone: see above
    return torch.empty(shape).normal_(0.0, std, generator=generator)


class GPT(nn.Module):
    def __init__(self, config, seed=1337):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is None: set it to the tokenizer's number of ids")
        self.config = config
        self.recompute = False  # True: a block keeps its input alone, and runs again in the backward pass
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.embed.weight.is_meta:  # shapes alone have no values
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, seed))

    def forward(self, idx, targets=None, cache=None, logits="all"):
        """(B, T) token ids -> (logits, loss).

        logits says which to compute: "all" (B, T, V), "last" (B, 1, V), or "none" for None. loss is the mean
        cross-entropy in nats over the (B, T) targets, those of -1 left out; None without targets. With a cache the
        ids continue what it holds; ValueError where they do not fit into it, or into block_size without one.
        """
        B, T = idx.shape
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
            positions, mask = torch.arange(T, device=idx.device)[None], None
        else:
            positions, mask = cache.positions(T), cache.mask(T)
        cos, sin = rope_cos_sin(positions, rope_frequencies(self.config, idx.device))
        x = self.dropout(self.embed(idx))                               # (B, T, C)
        for block in self.layers:
            if self.recompute and self.training:
                x = checkpoint(block, x, cos, sin, cache, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, mask)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x[:, -1:] if logits == "last" else x)
        loss = out = None
        if targets is not None:
            loss = HeadLoss.apply(x.flatten(0, 1), self.head_weight, targets.flatten(), torch.is_grad_enabled())
        if logits != "none":
            out = linear(x, self.embed.weight) if self.lm_head is None else self.lm_head(x)
        return out, loss

    @property
    def head_weight(self):
        """The (V, C) matrix that makes logits: the embedding table where they are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def num_params(self, embedding=True):
        """Number of parameters; embedding=False leaves out the embedding table and an untied head."""
        tables = {id(self.embed.weight): self.embed.weight, id(self.head_weight): self.head_weight}
        total = sum(p.numel() for p in self.parameters())
        return total if embedding else total - sum(p.numel() for p in tables.values())

    def flops_per_token(self, T=None):
        """Training FLOPs for one token of a T-token sequence (block_size if None), forward and backward:
        6 per matmul weight and 12 L H D T for attention, the causal half not taken off (PaLM, arXiv 2204.02311, app. B).
        n_kv_head changes the first term only. With mla, D is the mean width of a key and a value, both expanded."""
        c = self.config
        matmul = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        if self.lm_head is not None:
            matmul -= self.embed.weight.numel()  # a lookup, no product
        widths = c.nope_head_dim + c.rope_head_dim + c.v_head_dim if c.attention == "mla" else 2 * c.head_dim
        return 6 * matmul + 6 * c.n_layer * c.n_head * widths * (T or c.block_size)

    def kv_bytes_per_token(self, dtype=torch.float32):
        """Bytes that the cache holds for one token of one sequence: 2 (key and value) L K D elements, or L (R + P) with mla."""
        return self.config.n_layer * math.prod(self.config.cached) * dtype.itemsize


# -- linear layers and norms ---------------------------------------------------------------------------------------------

# Torch's own, but for float32 on CPUs, where they are most of a training step: torch's products go to MKL, and oneDNN, which
# it ships as well, was 1.2 to 2.2 x as fast on an AMD EPYC (results/cpu_float32.py times a step with both), and its RMSNorm
# is a chain of a dozen small operations. ONEDNN = False goes back.
ONEDNN = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def on_cpu_in_float32(x):
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


if ONEDNN:
    library = torch.library.Library("nanogqa", "DEF")
    library.define("onednn_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

    @torch.library.impl(library, "onednn_product", "CompositeExplicitAutograd")
    def eager_product(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @torch.library.register_fake("nanogqa::onednn_product", lib=library)
    def shape_of_product(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.size(0))


def onednn_product(x, weight, bias=None):
    """x @ weight.T + bias by oneDNN, for weight as it is or packed. torch.compile takes torch's own operator for constant
    weights only, so it gets a name of ours for it; in eager mode that would cost a detour through Python."""
    if torch.compiler.is_compiling():
        return torch.ops.nanogqa.onednn_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """F.linear and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = onednn_product(grad, weight.t())
        grad_weight = onednn_product(rows.t(), x.flatten(0, -2).t())
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias else None


def linear(x, weight, bias=None):
    """x @ weight.T + bias over the last dimension."""
    if ONEDNN and on_cpu_in_float32(x):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x.contiguous(), self.weight, self.bias)  # rows with gaps take oneDNN many times as long


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of the logits x @ weight.T, for (N, C) x, (V, C) weight and (N,) targets, -1 left out.

    Logits exist for some rows at a time, never (N, V): with 50,304 ids they would be most of a training step's memory.
    So the gradients are made on the way: of a row's logits it is (softmax - one at the target) / number of targets.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, gradients):
        total = x.new_zeros((), dtype=torch.float32)
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if gradients else (None, None)
        share = (targets >= 0) / (targets >= 0).sum()                   # (N,) of each row in the mean
        rows = max(1, (2**23 if x.device.type == "cpu" else 2**28) // weight.size(0))
        for part in range(0, len(x), rows):
            part = slice(part, part + rows)
            logits, target, w = linear(x[part], weight), targets[part, None].clamp(min=0), share[part, None]
            top, at = logits.max(dim=-1, keepdim=True)
            below = (top - logits.gather(1, target)).float()            # the likeliest id's logit less the target's
            p, logits = logits.float().softmax(dim=-1), None            # (n, V)
            total += ((below - p.gather(1, at).log()) * w).sum()        # log p of the likeliest id never underflows
            if gradients:
                p = p.scatter_add_(1, target, torch.full_like(below, -1.0)).to(top.dtype)
                dx[part] = linear(p, weight.t()) * w
                dw += linear(p.t(), (x[part] * w.to(x.dtype)).t())
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), dw.mul_(grad), None, None  # in place: each is used once


class RMSNormFunction(torch.autograd.Function):
    """y = n w with n = r x and r = (mean(x^2) + eps)^-1/2; then dx = r (g w - n mean(g w n)) and dw = sum(g n)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx, grad):
        n, r, weight = ctx.saved_tensors
        gn = grad * n
        mean = (gn @ weight).div_(weight.numel()).unsqueeze(-1)
        return (grad * weight).addcmul_(n, mean, value=-1).mul_(r), gn.flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467), in x's dtype.

    Autocast would widen the result to float32 on CUDA, and queries and keys in float32 have no fused attention kernel.
    """

    def forward(self, x):
        if on_cpu_in_float32(x):
            return RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)
