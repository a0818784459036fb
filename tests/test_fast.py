"""The plain modules of model.py and the faster ones of nanogqa/fast.py compute the same."""
import weakref

import pytest
import torch
from conftest import toy_config, toy_ids, toy_model
from test_mla import mla_model

from model import GPT
from nanogqa.cache import KVCache
from nanogqa import fast
from nanogqa.fast import accelerate, prepare_for_decoding

SHAPES = {
    "mha": {}, "gqa": dict(n_kv_head=2), "mqa-untied": dict(n_kv_head=1, tie_embeddings=False),
    "biases": dict(qk_norm=False, qkv_bias=True), "mla": dict(attention="mla"),
    "mla-plain-latents": dict(attention="mla", qk_norm=False, q_lora_rank=12),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


def small_targets():
    ids = toy_ids(3, 40)
    targets = ids.roll(-1, 1)
    targets[0, 30:] = -1
    return ids, targets


def loss_and_gradients(model, n_targets):
    ids, targets = small_targets()
    model.zero_grad()
    loss = model(ids, targets, n_targets, logits="none")[1]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("n_targets", [None, 500])
def test_losses_and_gradients_agree(shape, n_targets):
    plain, changed = GPT(toy_config(**shape)), accelerate(GPT(toy_config(**shape)))
    loss, gradients = loss_and_gradients(plain, n_targets)
    fast_loss, fast_gradients = loss_and_gradients(changed, n_targets)
    torch.testing.assert_close(fast_loss, loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(fast_gradients[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_agree_under_torch_compile(frozen):
    """torch 2.11 cut the gradient of an autograd.Function whose output was written in place."""
    torch.compiler.reset()

    def layer_and_loss(x, weight, targets):
        x = fast.linear(x, weight[:8])
        return fast.ChunkedHeadLoss()(x, weight, targets, torch.tensor(12))
    compiled = torch.compile(layer_and_loss, backend="eager")
    x, weight = torch.randn(2, 6, 8), torch.randn(11, 8)
    targets = toy_ids(2, 6, vocab=11)
    gradients = []
    for function in (layer_and_loss, compiled):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        function(*inputs, targets).backward()
        assert (inputs[1].grad is None) == frozen
        gradients.append([value.grad for value in inputs if value.grad is not None])
    for eager, traced in zip(*gradients, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(traced, eager)


def model_of(shape):
    others = {name: value for name, value in shape.items() if name != "attention"}
    if others == shape:
        return toy_model(**shape)
    return mla_model(**others)


def test_logits_agree_with_and_without_a_cache(shape):
    plain, ids = model_of(shape), toy_ids(2, 30)
    with torch.inference_mode():
        expected = plain(ids)[0]
        for change in (accelerate, lambda model: prepare_for_decoding(model, 2)):
            model = change(model_of(shape))
            torch.testing.assert_close(model(ids)[0], expected, atol=1e-4, rtol=1e-4)
            cache = KVCache(model.config, 2, 30)
            parts = [model(part, cache=cache)[0] for part in ids.split([11, 1, 7, 11], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not fast.ONEDNN, reason="weights are not packed here")
def test_decoding_frees_the_plain_weights(shape):
    model = toy_model(**shape)
    plain = {name: weakref.ref(p) for name, p in model.named_parameters() if p.dim() == 2}
    prepare_for_decoding(model, 2)
    left = {name for name, reference in plain.items() if reference() is not None}
    assert left == {"embed.weight", *(name for name in plain if "kv_b_proj" in name)}, "these are read as matrices too"


def test_products_read_rows_without_gaps(monkeypatch):
    """Without qk_norm the latent goes into kv_b_proj as a slice, for which oneDNN has a way that takes twenty times as long."""
    inputs, linear = [], fast.linear
    monkeypatch.setattr(fast, "linear", lambda x, *args: inputs.append(x.is_contiguous()) or linear(x, *args))
    model = accelerate(GPT(toy_config(attention="mla", qk_norm=False)))
    model(toy_ids(), logits="none")
    assert len(inputs) >= 14 and all(inputs)


def test_parameters_keep_their_names_and_are_the_same_tensors(shape):
    model = GPT(toy_config(**shape))
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    kinds = {type(module) for module in model.modules()}
    assert torch.nn.Linear not in kinds and torch.nn.RMSNorm not in kinds
    assert fast.FastLinear in kinds and fast.FastRMSNorm in kinds


def test_a_model_without_targets_has_a_loss_of_zero():
    """A micro-batch whose targets are all left out must not divide by zero."""
    ids = toy_ids(2, 8)
    for model in (GPT(toy_config()), accelerate(GPT(toy_config()))):
        loss = model(ids, torch.full_like(ids, -1), logits="none")[1]
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_frozen_weights_cost_no_gradient(monkeypatch):
    """The products for their gradients were computed and thrown away."""
    plain, changed = GPT(toy_config()), accelerate(GPT(toy_config()))
    for model in (plain, changed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
    ids, targets = small_targets()
    products, product = [], fast.onednn_product
    monkeypatch.setattr(fast, "onednn_product", lambda *args: products.append(args) or product(*args))
    for model in (plain, changed):
        model(ids, targets, logits="none")[1].backward()
    for (name, expected), found in zip(plain.named_parameters(), changed.parameters(), strict=True):
        assert (found.grad is None) == ("q_proj" not in name)
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-3)
    if fast.ONEDNN:
        # forward 7 in each of 2 layers and the head; backward the input of all but what is below the first q_proj,
        # and the weights of the two q_proj
        rows = ids.numel()
        weights = [args for args in products if args[0].size(-1) == rows]
        assert len(weights) == 2


def test_losses_agree_in_bfloat16():
    """The distance of the target's logit to the largest one was rounded to bfloat16, 0.06 nats for a distance of 10."""
    logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).mul(8).bfloat16()
    targets = toy_ids(1, 64, vocab=32)
    found = fast.ChunkedHeadLoss()(logits[None], torch.eye(32).bfloat16(), targets, torch.tensor(64))
    expected = torch.nn.functional.cross_entropy(logits.float(), targets[0])
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)
