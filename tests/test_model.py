"""The model against references that share no code with it, and its properties."""
import cmath
import math

import pytest
import torch
from conftest import check_ragged, toy_config, toy_ids, toy_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig, CacheSpec, apply_rope, attend, initial_weight, rope_cos_sin, rope_frequencies
from nanogqa.cache import KVCache
from nanogqa.costs import flops_per_token, kv_bytes_per_token, kv_cache_bytes, num_params, numbers_read
from nanogqa.fast import ChunkedCrossEntropy, FastRMSNorm, RMSNormFunction, accelerate, linear


def reference_logits(model, ids):
    """The whole forward of one sequence in float64, one head and one position at a time, RoPE by complex numbers.

    Layers are local or global. Of each of these two kinds, one of every kv_share has keys and values; the others read the last
    ones. A local layer sees window tokens.
    """
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    H, K, D = c.n_head, c.n_kv_head, c.head_dim

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean() + c.norm_eps) * weight

    def rotate(x, position):
        out, turning = x.clone(), round(c.rope_fraction * D / 2)
        for i in range(turning):
            turned = complex(x[i], x[i + D // 2]) * cmath.exp(1j * position * c.rope_theta ** (-i / turning))
            out[i], out[i + D // 2] = turned.real, turned.imag
        return out

    def heads(x, layer, name, n, position=None):
        y = w[f"layers.{layer}.attn.{name}_proj.weight"] @ x + w.get(f"layers.{layer}.attn.{name}_proj.bias", 0)
        parts = [y[h * D:(h + 1) * D] for h in range(n)]
        if position is None:
            return parts
        if c.qk_norm:
            parts = [norm(part, w[f"layers.{layer}.attn.{name}_norm.weight"]) for part in parts]
        return [rotate(part, position) for part in parts]

    xs = [w["embed.weight"][i] for i in ids.tolist()]
    kept, number = {}, {"local": 0, "global": 0}
    for layer in range(c.n_layer):
        p = f"layers.{layer}."
        kind = "local" if c.window and (c.global_every == 0 or (layer + 1) % c.global_every) else "global"
        normed = [norm(x, w[p + "attn_norm.weight"]) for x in xs]
        q = [heads(x, layer, "q", H, t) for t, x in enumerate(normed)]
        if number[kind] % c.kv_share == 0:
            k = [heads(x, layer, "k", K, t) for t, x in enumerate(normed)]
            kept[kind] = k, k if c.kv_tied else [heads(x, layer, "v", K) for x in normed]
        k, v = kept[kind]
        number[kind] += 1
        for t in range(len(xs)):
            seen = range(max(0, t + 1 - c.window) if kind == "local" else 0, t + 1)
            outs = []
            for h in range(H):
                kv = h // (H // K)
                weights = torch.stack([q[t][h] @ k[s][kv] / math.sqrt(D) for s in seen]).softmax(0)
                out = sum(weight * v[s][kv] for weight, s in zip(weights, seen, strict=True))
                outs.append(rotate(out, -t) if c.kv_tied else out)
            xs[t] = xs[t] + w[p + "attn.o_proj.weight"] @ torch.cat(outs)
            y = norm(xs[t], w[p + "mlp_norm.weight"])
            gate = w[p + "mlp.gate_proj.weight"] @ y
            xs[t] = xs[t] + w[p + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[p + "mlp.up_proj.weight"] @ y))
    head = w["lm_head.weight"] if "lm_head.weight" in w else w["embed.weight"]
    return torch.stack([head @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("changes", [{}, dict(norm_eps=0.5, rope_theta=100.0), dict(qk_norm=False, qkv_bias=True, tie_embeddings=False, head_dim=12)],
                         ids=["qwen3", "eps-theta", "biases-untied-head_dim"])
def test_logits_equal_a_plain_reference(n_kv_head, changes):
    model, ids = toy_model(n_kv_head=n_kv_head, **changes), toy_ids(1, 12)
    logits = model(ids)[0][0].double()
    expected = reference_logits(model, ids[0])
    assert expected.std() > 0.5, "a model whose logits hardly differ would prove nothing"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


CHUNKS = {"one-shot": [48], "chunked": [7, 16, 1, 9, 15], "token-by-token": [1] * 48, "prefill-decode": [40] + [1] * 8}


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_cached_logits_equal_full_logits(n_kv_head, chunks, static):
    model, ids = toy_model(n_kv_head=n_kv_head), toy_ids(3, 48)
    with torch.inference_mode():
        full = model(ids)[0]
        cache, parts, start = KVCache(model.config, 3, 48, static=static), [], 0
        for n in chunks:
            parts.append(model(ids[:, start:start + n], cache=cache)[0])
            start += n
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-4)
    assert cache.length == 48


def test_the_model_keeps_no_state_between_caches():
    model, a, b = toy_model(n_kv_head=2), toy_ids(1, 20, seed=1), toy_ids(1, 20, seed=2)
    caches = KVCache(model.config, 1, 20), KVCache(model.config, 1, 30)
    with torch.inference_mode():
        for t in range(20):  # two texts take turns
            outs = [model(ids[:, t:t + 1], cache=cache)[0] for ids, cache in zip((a, b), caches)]
        for ids, out in zip((a, b), outs):
            torch.testing.assert_close(out[:, 0], model(ids)[0][:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_the_cache_can_be_repeated_for_samples_and_rewound(static):
    model, ids = toy_model(n_kv_head=2), toy_ids(1, 10)
    more = toy_ids(3, 1, seed=3)
    with torch.inference_mode():
        cache = KVCache(model.config, 1, 12, static=static)
        model(torch.cat((ids, ids[:, :2]), 1), cache=cache)
        cache.rewind(10)
        out = model(more, cache=cache.rows([0, 0, 0]))[0]
        assert cache.length == 10
        full = model(torch.cat((ids.expand(3, -1), more), 1))[0]
    torch.testing.assert_close(out[:, 0], full[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("chunks", [[12, 1, 1, 1], [5, 4, 3, 2, 1], [1] * 15], ids=str)
def test_rows_of_unequal_length_equal_themselves_alone(n_kv_head, chunks, static):
    check_ragged(toy_model(n_kv_head=n_kv_head), chunks, static)


@pytest.mark.parametrize("cached", [False, True], ids=["full", "chunked-cache"])
def test_future_tokens_cannot_change_past_logits(n_kv_head, cached):
    model, ids = toy_model(n_kv_head=n_kv_head), toy_ids(1, 24)
    changed = ids.clone()
    changed[0, 17] = (changed[0, 17] + 1) % 65

    def logits(ids):
        with torch.inference_mode():
            if not cached:
                return model(ids)[0][0]
            cache = KVCache(model.config, 1, 24)
            return torch.cat([model(part, cache=cache)[0][0] for part in ids.split(10, dim=1)])
    before, after = logits(ids), logits(changed)
    torch.testing.assert_close(before[:17], after[:17], atol=1e-6, rtol=0)
    assert (before[17:] - after[17:]).abs().amax(dim=1).min() > 1e-2, "the change must show from there on"


@pytest.mark.parametrize("kv", [2, 1])
def test_gqa_is_mha_with_copied_heads(kv):
    """Outputs and gradients: the gradient of a shared head is the sum over its copies."""
    gqa, ids = toy_model(n_kv_head=kv), toy_ids(2, 24)
    mha = GPT(toy_config(n_kv_head=4))
    copies, D = 4 // kv, gqa.config.head_dim
    weights = {}
    for name, weight in gqa.state_dict().items():
        shared = "k_proj" in name or "v_proj" in name
        weights[name] = weight.view(kv, D, -1).repeat_interleave(copies, 0).flatten(0, 1) if shared else weight
    mha.load_state_dict(weights)
    losses = [model(ids, ids.roll(-1, 1))[1] for model in (gqa, mha)]
    torch.testing.assert_close(gqa(ids)[0], mha(ids)[0], atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in gqa.named_parameters():
        grad = mha.get_parameter(name).grad
        if "k_proj" in name or "v_proj" in name:
            grad = grad.view(kv, copies, D, -1).sum(1).flatten(0, 1)
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


def plain_attention(q, k, v, visible):
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("T,S", [(9, 9), (1, 9), (4, 9)])
def test_both_routes_of_attention_equal_plain_matmul(n_kv_head, T, S):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, T, 8, generator=g)
    k, v = torch.randn(2, 2, n_kv_head, S, 8, generator=g).unbind(0)
    visible = torch.ones(S, S, dtype=torch.bool).tril()[S - T:]
    expected = plain_attention(q, k, v, visible)
    torch.testing.assert_close(attend(q, k, v, visible[None, None].expand(2, -1, -1, -1)), expected, atol=1e-5, rtol=1e-5)
    if T in (1, S):
        torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=1e-5)


class Elsewhere(torch.Tensor):
    """Says that it is on a device whose kernels copy shared heads, as a GPU's do in float32."""
    device = torch.device("mps")


@pytest.mark.parametrize("T,S", [(9, 9), (1, 9), (4, 9)])
def test_folded_attention_equals_plain_matmul(n_kv_head, T, S):
    """The queries of a head become rows of one matrix: with a mask for each row of the batch, one for all, and none."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, T, 8, generator=g)
    k, v = torch.randn(2, 2, n_kv_head, S, 8, generator=g).unbind(0)
    causal = torch.ones(S, S, dtype=torch.bool).tril()[S - T:][None, None]
    padded = causal & (torch.arange(S) >= torch.tensor([0, 3])[:, None, None, None])
    padded[:, :, :, S - T] = True  # each query sees something, so that plain softmax is defined
    here = q.as_subclass(Elsewhere)
    for mask in (causal, padded):
        torch.testing.assert_close(attend(here, k, v, mask).as_subclass(torch.Tensor), plain_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
    if T in (1, S):
        torch.testing.assert_close(attend(here, k, v).as_subclass(torch.Tensor), plain_attention(q, k, v, causal), atol=1e-5, rtol=1e-5)
    else:
        for queries in (q, here):
            with pytest.raises(AssertionError, match="aligned to the top left"):
                attend(queries, k, v)


def test_rows_may_see_different_lengths():
    """The mask is per row, (B, 1, T, S), so that rows of unequal prompts can share a batch."""
    g = torch.Generator().manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 3, 8, generator=g), torch.randn(2, 2, 2, 9, 8, generator=g).unbind(0)
    visible = torch.arange(9) <= torch.tensor([[3, 4, 5], [6, 7, 8]])[:, None, :, None]
    torch.testing.assert_close(attend(q, k, v, visible), plain_attention(q, k, v, visible), atol=1e-5, rtol=1e-5)


class Made(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes with memory of its own, and of what SDPA's kernel is given."""

    def __init__(self):
        super().__init__()
        self.numels, self.kernel_keys = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func):
            self.kernel_keys.append(tuple(args[1].shape))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.numels.append(x.numel())
        return out


@pytest.mark.parametrize("T", [1, 5, 300], ids=["decode", "chunk", "prefill"])
def test_keys_and_values_are_never_expanded(n_kv_head, T):
    """The kernel itself gets n_kv_head heads, and nothing as large as an expanded key is made on the way."""
    S, D = 300, 64
    q, k, v = torch.randn(1, 4, T, D), torch.randn(1, n_kv_head, S, D), torch.randn(1, n_kv_head, S, D)
    mask = torch.ones(S, S, dtype=torch.bool).tril()[None, S - T:] if T == 5 else None
    with Made() as made, torch.inference_mode():
        attend(q, k, v, mask)
    assert made.kernel_keys == [(1, n_kv_head, S, D)]
    if T < S:
        assert max(made.numels) < S * D, "something as large as one head's keys was made"


def test_the_kernel_gets_the_heads_of_the_cache(n_kv_head):
    """In the whole model, for prompts, parts and single tokens."""
    model, ids = toy_model(n_kv_head=n_kv_head), toy_ids(2, 20)
    for static in (False, True):
        cache = KVCache(model.config, 2, 20, static=static)
        with Made() as made, torch.inference_mode():
            for part in ids.split([9, 8, 1, 2], dim=1):
                model(part, cache=cache)
        assert [shape[1] for shape in made.kernel_keys] == [n_kv_head] * 8


def test_bytes_follow_from_what_layers_cache():
    """A layer may keep a number of tokens, or nothing at all, as it reads what another one keeps."""
    class Config:
        def cache_specs(self):
            return [CacheSpec(2, (8, 8)), CacheSpec(1, (24,), window=10), CacheSpec(2, (8, 8), source=0)]
    assert kv_cache_bytes(Config(), 30) == 4 * (2 * 16 * 30 + 24 * 10)
    assert kv_bytes_per_token(Config(), torch.bfloat16) == 2 * (2 * 16 + 24)
    assert sum(numbers_read(layer, 30) for layer in Config().cache_specs()) == 2 * 2 * 16 * 30 + 24 * 10


def test_rope_depends_on_distance_only_and_turns():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind()

    def score(m, n):
        turned = [apply_rope(x, *rope_cos_sin(torch.tensor([[p]]), rope_frequencies(toy_config(head_dim=16)))) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum().item()
    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(3, 0) == pytest.approx(score(5, 2), abs=1e-4)
    assert abs(score(5, 2) - score(2, 5)) > 1e-2, "not a rotation: direction does not matter"
    assert abs(score(5, 2) - score(5, 4)) > 1e-2, "not a rotation: distance does not matter"


def test_rope_stays_exact_in_a_bfloat16_model():
    model = toy_model(n_kv_head=2).bfloat16()
    assert not list(model.buffers()), "nothing of RoPE for .bfloat16() to round"
    positions = []
    handle = model.layers[0].attn.register_forward_pre_hook(lambda module, args: positions.append(args[1].cos.dtype))
    model(toy_ids(1, 4))
    handle.remove()
    assert positions == [torch.float32]
    cos, sin = rope_cos_sin(torch.tensor([[0, 1, 257, 8191]]), rope_frequencies(toy_config(head_dim=16)))
    angle = torch.tensor([0, 1, 257, 8191], dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0].double(), torch.cat((angle.cos(), angle.cos()), -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin[0, 0].double(), torch.cat((-angle.sin(), angle.sin()), -1), atol=1e-3, rtol=0)
    # the rotation is in float32, and rounded once
    x = torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle[:3]), angle[:3])
    expected = torch.cat((turned.real, turned.imag), -1)
    rounding = 2**-8 * expected.abs() + 1e-4
    assert ((apply_rope(x, cos[:, :, :3], sin[:, :, :3]).double() - expected).abs() <= rounding).all()


def test_positions_are_those_in_the_text():
    """From 0 for the first token of each row, not counting its padding. Logits depend on distances alone."""
    model, seen = toy_model(n_kv_head=2), []
    model.layers[0].attn.register_forward_pre_hook(lambda module, args: seen.append(args[1].cos))
    cache = KVCache(model.config, 2, 8)
    cache.padding = torch.tensor([0, 2])
    model(toy_ids(1, 3))
    model(toy_ids(2, 4), cache=cache)
    model(toy_ids(2, 1), cache=cache)
    expected = [[[0, 1, 2]], [[0, 1, 2, 3], [0, 0, 0, 1]], [[4], [2]]]
    for cos, positions in zip(seen, expected, strict=True):
        assert torch.equal(cos, rope_cos_sin(torch.tensor(positions), rope_frequencies(model.config))[0])


def test_cache_bytes_equal_the_formula():
    sizes = {}
    for kv in (4, 2, 1):
        model = toy_model(n_kv_head=kv)
        for dtype in (torch.float32, torch.bfloat16):
            cache = KVCache(model.config, 3, 40, torch.empty(0, dtype=dtype))
            assert cache.nbytes == 3 * 40 * kv_bytes_per_token(model.config, dtype) == 2 * 2 * 3 * kv * 40 * 8 * dtype.itemsize
        sizes[kv] = cache.nbytes
    assert sizes[1] * 4 == sizes[2] * 2 == sizes[4]


def test_running_past_the_end_of_the_cache_is_an_error():
    model = toy_model(n_kv_head=2)
    cache = KVCache(model.config, 1, 8)
    model(toy_ids(1, 8), cache=cache)
    with pytest.raises(ValueError, match="8 of at most 8 tokens: 1 more"):
        model(toy_ids(1, 1), cache=cache)
    with pytest.raises(ValueError, match="block_size=48"):
        KVCache(model.config, 1, 49)
    with pytest.raises(ValueError, match="49 tokens are more than block_size=48"):
        model(toy_ids(1, 49))


def test_which_logits_are_computed_is_an_argument():
    model, ids = toy_model(n_kv_head=2), toy_ids(2, 10)
    full, none = model(ids)
    assert none is None and full.shape == (2, 10, 65)
    torch.testing.assert_close(model(ids, logits="last")[0], full[:, -1:], atol=1e-5, rtol=1e-5)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    logits, loss = model(ids, targets, logits="none")
    assert logits is None
    log_probs = full.double().log_softmax(-1)
    expected = -torch.stack([log_probs[b, t, targets[b, t]] for b in range(2) for t in range(9)]).mean()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_variants_share_every_weight_of_equal_shape():
    base = dict(GPT(toy_config(), seed=5).named_parameters())
    for changes in (dict(n_kv_head=1), dict(n_layer=5), dict(n_ff=128), dict(tie_embeddings=False), dict(qk_norm=False)):
        same = 0
        for name, parameter in GPT(toy_config(**changes), seed=5).named_parameters():
            if name in base and base[name].shape == parameter.shape:
                assert torch.equal(base[name], parameter), (changes, name)
                same += parameter.dim() == 2
        assert same >= 7
    with torch.device("meta"):  # another default device, as torch.device("cuda") is
        drawn = initial_weight("embed.weight", (5, 7), 5, 0.02)
    assert torch.equal(drawn, initial_weight("embed.weight", (5, 7), 5, 0.02))
    other = dict(GPT(toy_config(), seed=6).named_parameters())
    assert not torch.equal(base["embed.weight"], other["embed.weight"])
    assert not torch.equal(base["layers.0.attn.q_proj.weight"], base["layers.1.attn.q_proj.weight"])


def test_weights_before_training():
    """Matrices by their number of inputs, norms 1, biases 0."""
    model = GPT(toy_config(qkv_bias=True, n_kv_head=1, n_ff=256, tie_embeddings=False))
    for name, p in model.named_parameters():
        if name == "embed.weight":
            continue
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert p.std().item() == pytest.approx(p.size(1) ** -0.5, rel=0.1), name
            assert p.mean().item() == pytest.approx(0, abs=0.1 * p.size(1) ** -0.5), name


def test_embed_std_scales_the_embedding_alone():
    small = GPT(toy_config(tie_embeddings=False)).state_dict()
    large = GPT(toy_config(tie_embeddings=False, embed_std=1.0)).state_dict()
    for name, weight in small.items():
        torch.testing.assert_close(large[name], weight * 50 if name == "embed.weight" else weight)
    assert large["embed.weight"].std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_costs_equal_a_hand_count(tied):
    """2 layers, 4 heads of 8, 2 key/value heads, width 32, MLP 64, vocabulary 65, counted by hand."""
    model = toy_model(n_kv_head=2, tie_embeddings=tied)
    matrices = 2 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32 + 3 * 32 * 64)
    norms = 2 * (32 + 32 + 8 + 8) + 32
    table = 65 * 32
    assert num_params(model) == matrices + norms + table * (1 if tied else 2)
    assert num_params(model, embedding=False) == matrices + norms
    assert flops_per_token(model, 10) == 6 * (matrices + table) + 12 * 2 * 4 * 8 * 10
    assert kv_bytes_per_token(model.config) == 2 * 2 * 2 * 8 * 4


def test_training_and_decoding_have_no_graph_breaks():
    """fullgraph refuses graph breaks; the eager backend keeps it quick. torch.compile must give the same logits."""
    torch._dynamo.reset()
    model, ids = toy_model(n_kv_head=2), toy_ids(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids)[0], model(ids)[0])
    with torch.inference_mode():
        cache = KVCache(model.config, 2, 17)
        compiled(ids[:, :15], cache=cache)
        out = compiled(ids[:, 15:], cache=cache)[0]
    torch.testing.assert_close(out[:, 0], model(ids)[0][:, -1], atol=1e-4, rtol=1e-4)
    training = torch.compile(accelerate(toy_model(n_kv_head=2)).train(), fullgraph=True, backend="eager")
    loss = training(ids, ids, torch.tensor(32), logits="none")[1]
    loss.backward()
    torch.testing.assert_close(loss.detach(), model(ids, ids)[1].detach())


@pytest.mark.parametrize("changes,words", [
    (dict(n_kv_head=3), "n_kv_head=3 does not divide n_head=4: choose one of [1, 2, 4]"),
    (dict(n_kv_head=8), "n_kv_head=8 does not divide n_head=4"),
    (dict(n_kv_head=0), "n_kv_head must be at least 1, not 0"),
    (dict(n_embd=30), "n_embd=30 is not a multiple of n_head=4"),
    (dict(head_dim=7), "head_dim=7 is odd"),
    (dict(dropout=1.0), "dropout must be"),
    (dict(norm_eps=0.0), "norm_eps must be from 1e-30"),
])
def test_impossible_shapes_are_named(changes, words):
    with pytest.raises(ValueError) as error:
        toy_config(**changes)
    assert words in str(error.value)


def test_derived_defaults():
    c = GPTConfig(n_embd=768, n_head=12)
    assert (c.n_kv_head, c.head_dim, c.n_ff) == (12, 64, 2048)


def test_norms_keep_the_type_of_their_input():
    """Queries and keys that autocast widened to float32 would lose the fused attention kernel on CUDA."""
    norm, x = FastRMSNorm(16, 1e-5), torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16 and norm(x).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (2, 3, 4, 16)], ids=str)
def test_fast_operations_equal_plain_formulas(shape):
    """Values and gradients in float32 against float64 and torch's own autograd, also for gradients that are not contiguous."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(shape, generator=g), torch.randn(7, 16, generator=g), torch.randn(7, generator=g)
    norm = FastRMSNorm(16, 1e-5)
    norm.weight.data = torch.randn(16, generator=g)

    def plain_norm(x, w):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w
    cases = [(lambda x, w, b: linear(x, w, b), lambda x, w, b: x @ w.mT + b, (x, weight, bias)),
             (lambda x, w: linear(x, w), lambda x, w: x @ w.mT, (x, weight)),
             (lambda x, w: RMSNormFunction.apply(x, w, 1e-5), plain_norm, (x, norm.weight.data))]
    for fast, plain, inputs in cases:
        single = [i.clone().requires_grad_() for i in inputs]
        double = [i.double().requires_grad_() for i in inputs]
        for f, args in ((fast, single), (plain, double)):
            y = f(*args)
            grad = torch.randn(y.transpose(0, -1).shape, generator=torch.Generator().manual_seed(1)).transpose(0, -1)
            y.backward(grad.to(y.dtype))
        torch.testing.assert_close(fast(*single).double(), plain(*double), atol=1e-5, rtol=1e-5)
        for a, b in zip(single, double):
            torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_only():
    model, ids = toy_model(n_kv_head=2, dropout=0.5), toy_ids(1, 8)
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


class Nothing(torch.nn.Module):
    """What dropout leaves at worst."""
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("dropout,weight", [("attn_dropout", "attn.o_proj.weight"), ("mlp_dropout", "mlp.down_proj.weight"), (None, "embed.weight")])
def test_dropout_acts_on_the_embedding_and_on_what_each_sublayer_adds(dropout, weight):
    """Where it leaves nothing, the model is the one whose last weight before it is 0."""
    ids = toy_ids(1, 8)
    dropped, zeroed = toy_model(n_kv_head=2, tie_embeddings=False), toy_model(n_kv_head=2, tie_embeddings=False)
    if dropout is None:
        dropped.dropout = Nothing()
    else:
        setattr(dropped.layers[0], dropout, Nothing())
        weight = f"layers.0.{weight}"
    zeroed.get_parameter(weight).data.zero_()
    assert torch.equal(dropped(ids)[0], zeroed(ids)[0])
    assert not torch.equal(dropped(ids)[0], toy_model(n_kv_head=2, tie_embeddings=False)(ids)[0])


def test_loss_of_an_untrained_model_is_that_of_a_uniform_guess():
    ids = toy_ids(4, 48)
    loss = GPT(toy_config())(ids, ids.roll(-1, 1))[1].item()
    assert loss == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize("n,v,ignored", [(700, 50304, 0), (700, 50304, 90), (50, 65, 7), (1, 3, 0)])
def test_loss_head_in_chunks_is_cross_entropy(n, v, ignored):
    """Against torch's own in float64, with logits far enough apart that some probabilities are 0 in float32."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n, 8, generator=generator) * 6, torch.randn(v, 8, generator=generator) * 6
    targets = torch.randint(v, (n,), generator=generator)
    targets[:ignored] = -1
    losses, grads = [], []
    for dtype in (torch.float64, torch.float32):
        a, b = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if dtype == torch.float64:
            losses.append(F.cross_entropy(a @ b.T, targets, ignore_index=-1))
        else:
            losses.append(ChunkedCrossEntropy.apply(a, b, targets, (targets >= 0).sum(), True))
            with torch.no_grad():
                torch.testing.assert_close(ChunkedCrossEntropy.apply(a, b, targets, (targets >= 0).sum(), False), losses[1])
        (losses[-1] * 3).backward()
        grads.append((a.grad, b.grad))
    assert losses[0] > 50 or v < 50304
    torch.testing.assert_close(losses[1].double(), losses[0], rtol=1e-5, atol=1e-5)
    for expected, got in zip(*grads):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
