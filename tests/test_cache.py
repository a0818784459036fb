"""Windows, shared and tied keys and values, partial rotation: each alone and combined, against definitions and full forwards."""
import random

import pytest
import torch
from conftest import check_ragged, toy_config, toy_ids, toy_model
from test_mla import mla_model
from test_model import reference_logits

import sample
import train
from model import GPT
from nanogqa.cache import KVCache
from nanogqa.costs import bytes_per_step, flops_per_token, kv_cache_bytes, num_params
from nanogqa.fast import accelerate, prepare_for_decoding
from nanogqa.runtime import compile_for_decoding, pick_runtime
from sample import generate

ALONE = {
    "window": dict(window=7), "window-of-one": dict(window=1), "window-and-global": dict(n_layer=5, window=6, global_every=3),
    "all-global": dict(window=4, global_every=1), "tied": dict(kv_tied=True), "share": dict(n_layer=5, kv_share=2),
    "share-in-windows": dict(n_layer=6, kv_share=2, window=6, global_every=2), "half-rotated": dict(rope_fraction=0.5),
    "not-rotated": dict(rope_fraction=0.0, kv_tied=True),
}


def combinations(n):
    """n models with several of the settings each, drawn once for all."""
    rng, found = random.Random(4), {}
    plain = dict(window=None, kv_share=1, kv_tied=False, rope_fraction=1.0)
    while len(found) < n:
        changes = dict(
            n_layer=rng.choice([3, 4, 6]), n_kv_head=rng.choice([4, 2, 1]), window=rng.choice([None, 3, 5, 8, 11]),
            kv_share=rng.choice([1, 2, 3]), kv_tied=rng.choice([False, True]), rope_fraction=rng.choice([0.0, 0.25, 0.5, 1.0]),
            qk_norm=rng.choice([True, True, False]))
        if changes["window"]:
            changes["global_every"] = rng.choice([0, 2, 3])
        combined = [key for key, value in plain.items() if changes[key] != value]
        if len(combined) >= 2 and changes not in found.values():
            found[f"random-{len(found)}"] = changes
    return found


MODELS = ALONE | combinations(10)
SOME = {name: MODELS[name] for name in ("window", "share-in-windows", "tied", "not-rotated", "random-0", "random-9")}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def changes(request):
    return request.param


@pytest.fixture(params=SOME.values(), ids=SOME)
def some_changes(request):
    return request.param


def model_of(changes, block_size=48, **more):
    """A toy model; without qk_norm its scores would be so large that attention sees one token alone."""
    model = toy_model(**{"block_size": block_size, **changes}, **more)
    if model.config.attention == "mla" or not model.config.qk_norm:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "q_proj.weight" in name:
                    parameter.div_(20)
    return model


def test_logits_equal_a_plain_reference(changes):
    model, ids = model_of(changes), toy_ids(1, 20)
    expected = reference_logits(model, ids[0])
    assert expected.std() > 0.5, "a model whose logits hardly differ would prove nothing"
    torch.testing.assert_close(model(ids)[0][0].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_cached_logits_equal_full_logits_far_beyond_the_window(changes, static):
    """In one shot, in parts that end before, at and after every boundary of the ring, and token by token."""
    T = 72
    model, ids, W = model_of(changes, T), toy_ids(2, T), changes.get("window") or 10
    boundaries = [*([W - 1] if W > 1 else []), 1, 1, W, W + 1, 2 * W]
    with torch.inference_mode():
        full = model(ids)[0]
        for start in ([T], boundaries, [], [2 * W + 3], [30, 17, 25]):
            parts = [*start, *[1] * (T - sum(start))]
            cache = KVCache(model.config, 2, T, static=static)
            out = torch.cat([model(part, cache=cache)[0] for part in ids.split(parts, dim=1)], dim=1)
            torch.testing.assert_close(out, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("room", [11, 12, 13])
def test_a_cache_as_long_as_the_window(static, room):
    """One place less, the same, and one more, which alone makes a ring."""
    model, ids = model_of(dict(n_layer=3, n_kv_head=2, window=12)), toy_ids(2, room)
    assert KVCache(model.config, 2, room, static=static).has_rings == (room == 13)
    with torch.inference_mode():
        full = model(ids)[0]
        for parts in ([room], [room - 1, 1], [5, 3, room - 8], [1] * room):
            cache = KVCache(model.config, 2, room, static=static)
            out = torch.cat([model(part, cache=cache)[0] for part in ids.split(parts, dim=1)], dim=1)
            torch.testing.assert_close(out, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("chunks", [[12, 1, 1, 1], [5, 4, 3, 2, 1], [1] * 15], ids=str)
def test_rows_of_unequal_length_equal_themselves_alone(some_changes, chunks, static):
    check_ragged(model_of(some_changes), chunks, static)


def test_a_static_cache_stays_where_it_is():
    """CUDA graphs read it at the address of their first call."""
    model = model_of(dict(n_kv_head=2))
    cache = KVCache(model.config, 1, 8, static=True)
    before = [*cache.layers[0], *cache.layers[1], cache.length]
    addresses = [x.data_ptr() for x in before]
    with torch.inference_mode():
        for n in (3, 1):
            model(toy_ids(1, n), cache=cache)
    assert cache.length == 4
    cache.rewind(0)
    now = [*cache.layers[0], *cache.layers[1], cache.length]
    assert [x.data_ptr() for x in now] == addresses and cache.length == 0
    assert all(a is b for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize("kind", [dict(n_kv_head=2), dict(n_kv_head=1, kv_tied=True), dict(attention="mla")], ids=str)
@pytest.mark.parametrize("cached", [None, [128, 1, 1, 1, 1], [1] * 132, [60, 72], [132]], ids=["full", "prompt", "steps", "parts", "one-shot"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_window_of_128_is_128_tokens(kind, cached, static):
    """The token itself and 127 before it: one layer that sees 129, or 127, differs."""
    model = model_of(dict(n_layer=1, block_size=140, window=128, **kind))
    ids = toy_ids(1, 132)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 65
    with torch.inference_mode():
        outs = []
        for text in (ids, changed):
            if cached is None:
                outs.append(model(text)[0][0])
                continue
            cache = KVCache(model.config, 1, 132, static=static)
            outs.append(torch.cat([model(part, cache=cache)[0][0] for part in text.split(cached, dim=1)]))
    moved = (outs[0] - outs[1]).abs().amax(dim=1) > 1e-6
    assert moved[2:130].sum() > 100 and moved[129], "tokens 2 to 129 see token 2"
    assert not moved[:2].any() and not moved[130:].any()


def test_the_ring_holds_the_window_alone():
    """On the tensors themselves, as numbers written out by hand."""
    for static in (False, True):
        config = toy_config(block_size=1000, n_layer=6, n_kv_head=2, window=16, global_every=3, kv_share=2)
        cache = KVCache(config, 3, 1000, static=static)
        # layers 0, 1, 3, 4 are local, 2 and 5 global; of each pair the second reads what the first has
        assert [[tuple(x.shape) for x in tensors] for tensors in cache.layers] == [
            [(3, 2, 16, 8)] * 2, [], [(3, 2, 1000, 8)] * 2, [(3, 2, 16, 8)] * 2, [], []]
        assert cache.nbytes == 3 * 4 * 2 * 2 * 8 * (16 + 1000 + 16) == 3 * kv_cache_bytes(config, 1000)
        assert KVCache(toy_config(block_size=1000, n_kv_head=2, kv_tied=True), 3, 1000).nbytes == 3 * 4 * 2 * 2 * 8 * 1000
        mla = toy_config(block_size=1000, attention="mla", window=10)
        assert KVCache(mla, 1, 1000).nbytes == 2 * 10 * 24 * 4 == kv_cache_bytes(mla, 1000)
    assert [layer.source for layer in config.cache_specs()] == [None, 0, None, None, 3, 2]
    short = toy_config(window=40)
    assert KVCache(short, 1, 30).nbytes == kv_cache_bytes(short, 30) == 2 * 2 * 4 * 8 * 30 * 4


def test_a_step_reads_the_window_alone(monkeypatch):
    """What attention is given, not what a formula says: no copy of the ring, and no more than its tokens."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention
    model = toy_model(n_layer=2, n_kv_head=2, window=16, global_every=2, block_size=300)
    cache = KVCache(model.config, 1, 300)
    with torch.inference_mode():
        model(toy_ids(1, 200), cache=cache)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *rest, **options: seen.append(
            (k.size(2), k.data_ptr())) or attend(q, k, v, *rest, **options))
        model(toy_ids(1, 1), cache=cache)
    assert seen == [(16, cache.layers[0][0].data_ptr()), (201, cache.layers[1][0].data_ptr())]


def test_bytes_and_flops_count_what_is_read():
    model = GPT(toy_config(n_layer=4, n_kv_head=2, window=16, global_every=2, kv_share=2, block_size=100))
    read = 4 * 2 * 2 * 8 * (16 + 100 + 16 + 100)  # again where a layer shares
    assert bytes_per_step(model, 3, 100, torch.float32) == 4 * num_params(model) + 3 * read
    assert kv_cache_bytes(model.config, 100) == read / 2
    whole = GPT(toy_config(n_layer=4, n_kv_head=2, kv_share=2, block_size=100))
    assert flops_per_token(whole) - flops_per_token(model) == 12 * 32 * (4 * 100 - (16 + 100 + 16 + 100))


def test_a_full_cache_refuses_more_tokens():
    """A ring would overwrite silently, and positions would go beyond what is trained."""
    for changes in ({}, dict(window=4), dict(window=4, global_every=2)):
        model = toy_model(**changes)
        for static, error in ((False, ValueError), (True, (IndexError, RuntimeError))):
            for parts in ([10, 1], [10, 2], [8, 3]):
                cache = KVCache(model.config, 1, 10, static=static)
                with torch.inference_mode():
                    model(toy_ids(1, parts[0]), cache=cache)
                    with pytest.raises(error):
                        model(toy_ids(1, parts[1]), cache=cache)


def test_a_ring_that_has_turned_cannot_go_back():
    model, ids = toy_model(window=4), toy_ids(1, 20)
    with torch.inference_mode():
        for static in (False, True):
            cache = KVCache(model.config, 1, 20, static=static)
            model(ids[:, :4], cache=cache)
            cache.rewind(2)  # nothing is overwritten yet
            out = model(ids[:, 2:10], cache=cache)[0]
            torch.testing.assert_close(out, model(ids[:, :10])[0][:, 2:], atol=1e-4, rtol=1e-4)
            with pytest.raises(ValueError, match="forgotten what precedes token 9"):
                cache.rewind(9)
            with pytest.raises(ValueError, match="holds 10 tokens, fewer than 11"):
                cache.rewind(11)
            cache.rewind(0)
            torch.testing.assert_close(model(ids, cache=cache)[0], model(ids)[0], atol=1e-4, rtol=1e-4)


# -- text and training -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fast", [False, True], ids=["plain", "packed"])
def test_text_with_cache_is_the_text_of_full_forwards(some_changes, fast):
    """Rows of different length, several samples, past the window and past the context, where it is read again."""
    model = model_of(some_changes)
    prompts = [toy_ids(1, n, seed=n)[0].tolist() for n in (30, 3, 14)]

    def text(**options):
        return [ids for _, ids in generate(model, prompts, 40, num_samples=2, temperature=0, **options)]
    expected = text(kv_cache=False)
    if fast:
        prepare_for_decoding(model, 6)
    assert text() == expected


@pytest.mark.parametrize("window", [None, 9])
def test_windows_of_latents(window):
    """MLA in a ring: absorbed, expanded and ragged; more than R = 16 tokens at once are expanded."""
    model, ids = mla_model(window=window, n_layer=3, global_every=2 if window else 0), toy_ids(2, 48)
    with torch.inference_mode():
        full = model(ids)[0]
        for static in (False, True):
            for parts in ([48], [20, 17, 1, 1, 9], [8, 1, 1, 9, 10, 19], [1] * 48):
                cache = KVCache(model.config, 2, 48, static=static)
                out = torch.cat([model(part, cache=cache)[0] for part in ids.split(parts, dim=1)], dim=1)
                torch.testing.assert_close(out, full, atol=1e-4, rtol=1e-4)
    for static in (False, True):
        check_ragged(model, [5, 4, 3, 2, 1], static)


def test_a_long_prompt_is_read_in_parts_of_1024_tokens():
    """Through sample.prefill, as sample.py reads it: three parts, and windows of which 21 fit into the prompt."""
    model = model_of(dict(n_layer=4, n_kv_head=2, window=100, global_every=2, kv_share=2), block_size=2300)
    ids, calls = toy_ids(2, 2110), []

    def watched(idx, **options):
        calls.append(tuple(idx.shape))
        return model(idx, **options)
    with torch.inference_mode():
        full = model(ids)[0]
        cache = KVCache(model.config, 2, 2300)
        torch.testing.assert_close(sample.prefill(watched, ids[:, :2100], cache), full[:, 2099:2100], atol=1e-4, rtol=1e-4)
        assert calls == [(2, 1024), (2, 1024), (2, 52)]
        for i in range(2100, 2110):
            torch.testing.assert_close(model(ids[:, i:i + 1], cache=cache)[0], full[:, i:i + 1], atol=1e-4, rtol=1e-4)


COMBINED = dict(n_layer=4, n_kv_head=2, window=8, global_every=2, kv_share=2, kv_tied=True, rope_fraction=0.5)


@pytest.mark.parametrize("lengths", [[25], [25, 6]], ids=["one", "ragged"])
def test_compiled_decoding_has_rings_too(graphs, lengths):
    """Rings and shared tensors need no graph beyond those of other models, one for prompts and one for single tokens, for
    prompts longer than the window. Shorter ones need one more."""
    model = toy_model(**COMBINED, block_size=80, tie_embeddings=False)
    compiled = compile_for_decoding(model, pick_runtime("cpu", "float32", True))
    for more, wanted in ((0, 2), (9, 2), (-20, 3), (-21, 3)):
        prompts = [toy_ids(1, max(2, n + more), seed=n)[0].tolist() for n in lengths]
        texts = []
        for options in (dict(kv_cache=False), dict(compiled=compiled)):
            texts.append([ids for _, ids in generate(model, prompts, 40 - more, temperature=0, **options)])
        assert texts[0] == texts[1] and len(graphs) == wanted


def test_gradients_with_recomputing_are_those_without():
    """Shared keys and values leave the block that computes them, and get gradients from the layers that read them."""
    ids, grads = toy_ids(2, 30), []
    for recompute in (False, True):
        for fast in (False, True):
            model = toy_model(**COMBINED).train()
            if fast:
                accelerate(model)
            model.recompute = recompute
            model(ids, ids.roll(-1, 1))[1].backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
    assert "layers.0.attn.k_proj.weight" in grads[0] and "layers.2.attn.k_proj.weight" not in grads[0]
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, atol=1e-5, rtol=1e-4)


def test_keys_and_values_leave_a_layer_only_where_others_read_them(monkeypatch):
    """Recomputing would keep them otherwise, and FSDP would gather gradients of them. What leaves is no view."""
    for changes, sources in (({}, []), (dict(attention="mla"), []), (COMBINED, [None, None, 0, 1]), (dict(n_layer=4, kv_share=2), [None, 0, None, 2])):
        model, passed, made = toy_model(**changes).train(), [], []
        model.recompute = True

        def keep(block, x, context, kv, use_reentrant, passed=passed, made=made):
            passed.append(kv)
            out = block(x, context, kv)
            made.append(out[1])
            return out
        monkeypatch.setattr("model.checkpoint", keep)
        model(toy_ids(2, 20))
        for layer, source in enumerate(sources):
            assert (passed[layer] is None) if source is None else (passed[layer] is made[source])
        if not sources:
            assert passed == made == [None, None]
        assert not any(x._is_view() for kv in made if kv is not None for x in kv)


def test_programs_know_the_settings(toy_run, tmp_path, capsys):
    """Trained, evaluated again from the checkpoint, resumed, and sampled with and without the cache."""
    flags = [f"--{key}={value}" for key, value in COMBINED.items()]
    train.main([*toy_run, *flags])
    out = capsys.readouterr().out
    for words in ("window 8, global_every 2", "kv_share 2", "kv_tied True", "rope_fraction 0.5",
                  "KV cache 128 bytes per token (64 beyond the window of 8) in float32"):
        assert words in out
    loss = out.split("val_loss ")[-1].split()[0]
    train.main([f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--eval_only=True"])
    assert f"val_loss {loss}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        train.main([*toy_run, *flags, "--init_from=resume", "--window=9"])
    assert exit.value.code == 2 and "window=9, but the model in" in capsys.readouterr().err
    texts = []
    for kv_cache in (True, False):
        sample.main([f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--prompt=the ", "--temperature=0", "--max_new_tokens=60",
                     f"--kv_cache={kv_cache}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 50


@pytest.mark.parametrize("changes,words", [
    (dict(window=0), "window must be at least 1"), (dict(kv_share=0), "kv_share must be at least 1"),
    (dict(global_every=3, window=4, n_layer=2), "global_every must be from 0 to n_layer"),
    (dict(global_every=-1, window=4), "global_every must be from 0 to n_layer"),
    (dict(global_every=2), "global_every=2 is for models with a window: set window, or leave global_every out"),
    (dict(rope_fraction=0.1), "rope_fraction=0.1 of a head is less than a pair: raise it"),
    (dict(rope_fraction=1.5), "rope_fraction must be at least 0 and at most 1"),
    (dict(attention="mla", kv_tied=True), "kv_tied=True is for attention=gqa: leave kv_tied out, or set attention=gqa"),
    (dict(attention="mla", kv_share=2), "kv_share=2 is for attention=gqa"),
    (dict(attention="mla", rope_fraction=0.5), "rope_fraction=0.5 is for attention=gqa")], ids=str)
def test_what_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        toy_config(**changes)
    assert words in str(error.value)
