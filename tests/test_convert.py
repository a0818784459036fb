"""convert.py: exports and imports compared with transformers, pooled heads with closed forms."""

import ast
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import keys_of, load, load_model, toy_ids, toy_model
from test_inputs import fails

import convert
import nanogqa.hf_model
import nanogqa.pool
import sample
import train
from model import GPT, GPTConfig, rope_frequencies
from nanogqa import costs, saver, tokenizer
from nanogqa.configurator import UserError
from nanogqa.hf_model import EXPORTABLE, windows_of
from nanogqa.pool import best_partition
from nanogqa.prompts import encode_prompts
from nanogqa.tokenizer import get_tokenizer
from nanogqa.writer import write_dataset

H, K, D, C = 4, 2, 8, 32


def command(*words, **settings):
    """Command-line arguments: the words, then --key=value for each setting."""
    return [*words, *(f"--{key}={value}" for key, value in settings.items())]


def save(model, folder, tokenizer="none"):
    """A checkpoint of model's weights in folder, as from a run; its path as text."""
    folder.mkdir(parents=True, exist_ok=True)
    saver.save(
        folder,
        dict(
            model=model.state_dict(),
            config=asdict(model.config),
            optimizer={},
            settings={},
            runtime={},
            step=0,
            val_loss=None,
            tokenizer=tokenizer,
            dataset_sha256="",
        ),
    )
    return str(folder)


def loaded(folder):
    return load_model(folder).eval()


def logits(model, ids=None):
    with torch.inference_mode():
        return model(toy_ids(vocab=model.config.vocab_size) if ids is None else ids)[0]


# -- pooling -------------------------------------------------------------------------------------


def pooled(model, tmp_path, **keys):
    new = tmp_path / "-".join(f"{key}{value}" for key, value in keys.items())
    source = save(model, tmp_path / "from")
    convert.main(command("pool", out_dir=source, new_dir=new, **keys))
    return loaded(new)


def per_head(weight, n):
    return weight.detach().view(n, -1, weight.size(1)).clone()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_mean_and_first_are_what_they_say(tmp_path, bias):
    model = toy_model(n_kv_head=4, qkv_bias=bias)
    for method, expected in (
        ("mean", lambda x: torch.stack((x[:2].mean(0), x[2:].mean(0)))),
        ("first", lambda x: x[[0, 2]]),
    ):
        new = pooled(model, tmp_path, n_kv_head=2, method=method)
        for old, layer in zip(model.layers, new.layers):
            for name in ("k_proj", "v_proj"):
                torch.testing.assert_close(
                    per_head(getattr(layer.attn, name).weight, 2),
                    expected(per_head(getattr(old.attn, name).weight, 4)),
                )
                if bias:
                    torch.testing.assert_close(
                        getattr(layer.attn, name).bias.view(2, D),
                        expected(getattr(old.attn, name).bias.view(4, D)),
                    )
            assert torch.equal(layer.attn.q_proj.weight, old.attn.q_proj.weight) and torch.equal(
                layer.attn.o_proj.weight, old.attn.o_proj.weight
            )
        assert new.config.n_kv_head == 2


def test_random_draws_only_keys_and_values_anew(tmp_path):
    model = toy_model(n_kv_head=4)
    new = pooled(model, tmp_path, n_kv_head=2, method="random")
    drawn = GPT(new.config, seed=1337).state_dict()
    for name, x in new.state_dict().items():
        assert torch.equal(
            x, drawn[name] if "k_proj" in name or "v_proj" in name else model.state_dict()[name]
        ), name


@pytest.mark.parametrize("method", ["mean", "first", "aligned"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_as_many_heads_as_before_is_the_identity(tmp_path, method, n_kv_head):
    model = toy_model(n_kv_head=n_kv_head)
    torch.testing.assert_close(
        logits(pooled(model, tmp_path, n_kv_head=n_kv_head, method=method)),
        logits(model),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("method", ["mean", "first", "aligned"])
def test_groups_of_one_head_keep_the_function(method):
    """The command copies heads where their number stays, so the methods are called here. RoPE sees each plane of a head by
    itself, as a complex number; a score is a sum of conj(q) k over planes, and values act through o v."""
    model = toy_model(n_kv_head=2)
    heads = nanogqa.pool.split_heads(model.state_dict(), "layers.0.attn.", model.config)
    new = getattr(nanogqa.pool, method)(heads, 2)

    def planes(x):
        return torch.complex(*x.chunk(2, dim=1))

    def function(one):
        k = planes(one.k).repeat_interleave(2, 0)
        v = one.v.repeat_interleave(2, 0)
        return torch.einsum("hpc,hpd->hpcd", planes(one.q).conj(), k), one.o @ v

    for before, after in zip(function(heads), function(new), strict=True):
        torch.testing.assert_close(after, before, atol=1e-10, rtol=1e-8)
    assert method != "aligned" or not torch.allclose(new.k, heads.k), "it has chosen another basis"


@pytest.mark.parametrize("before,after", [(1, 4), (2, 4), (1, 2)])
def test_more_heads_are_copies_and_the_same_function(tmp_path, before, after):
    model = toy_model(n_kv_head=before, qkv_bias=True)
    new = pooled(model, tmp_path, n_kv_head=after)
    assert new.config.n_kv_head == after
    torch.testing.assert_close(logits(new), logits(model), atol=1e-5, rtol=1e-5)


def rotate_planes(x, angles, scale=1.0):
    """Rotates each RoPE plane (i, i + D/2) of a (D, C) head by its angle, and scales."""
    a, b = x[: D // 2], x[D // 2 :]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin)) * scale


def twins(n_head, n_kv_head, parts, qk_norm=False, bias=False):
    """A model in which the key/value heads of each part are one head in different bases.

    All of their weights differ.
    """
    model = toy_model(
        n_head=n_head, n_kv_head=n_kv_head, n_embd=n_head * D, qk_norm=qk_norm, qkv_bias=bias
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.layers:
            k, v = block.attn.k_proj, block.attn.v_proj
            for part in parts:
                for j in part[1:]:
                    at, to = slice(part[0] * D, part[0] * D + D), slice(j * D, j * D + D)
                    angles = torch.rand(D // 2, generator=generator) * 2 * math.pi
                    if qk_norm:  # only signs commute with the norm's weights
                        angles = (angles > math.pi) * math.pi
                    scale = 1.0 if qk_norm else 0.5 + torch.rand(1, generator=generator)
                    orthogonal = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
                    for x in (k.weight, k.bias[:, None]) if bias else (k.weight,):
                        x[to] = rotate_planes(x[at], angles, scale)
                    for x in (v.weight, v.bias[:, None]) if bias else (v.weight,):
                        x[to] = orthogonal @ x[at]
    return model


@pytest.mark.parametrize(
    "n_head,n_kv_head,parts",
    [
        (4, 4, [[0, 1], [2, 3]]),
        (4, 4, [[0, 2], [1, 3]]),
        (4, 4, [[0, 1, 2, 3]]),
        (8, 8, [[0, 5], [1, 3], [2, 7], [4, 6]]),
        (8, 4, [[0, 3], [1, 2]]),
        (6, 6, [[0, 2, 5], [1, 3, 4]]),
    ],
)
@pytest.mark.parametrize(
    "qk_norm,bias", [(False, False), (False, True), (True, False)], ids=["llama", "bias", "qk_norm"]
)
def test_heads_that_differ_by_a_basis_pool_without_loss(
    tmp_path, n_head, n_kv_head, parts, qk_norm, bias
):
    """aligned finds keys that are rotated and scaled, values under an orthogonal map, and partners
    anywhere. mean does not."""
    model = twins(n_head, n_kv_head, parts, qk_norm, bias)
    expected = logits(model)
    for method, close in (("aligned", True), ("mean", False)):
        new = pooled(model, tmp_path, n_kv_head=len(parts), method=method)
        error = (logits(new) - expected).abs().max().item()
        assert (error < 1e-3) == close, (method, error)
        assert new.config.n_kv_head == len(parts) and costs.num_params(new) < costs.num_params(model)


def test_aligned_keeps_more_than_mean_of_unrelated_heads(tmp_path):
    model = toy_model(n_kv_head=4, qk_norm=False)
    error = {
        method: (logits(pooled(model, tmp_path, n_kv_head=2, method=method)) - logits(model))
        .square()
        .mean()
        .item()
        for method in ("mean", "aligned")
    }
    assert error["aligned"] < error["mean"]


def test_best_partition_is_the_best_of_all_that_exchanges_reach():
    likes = {frozenset((0, 3)), frozenset((1, 4)), frozenset((2, 5))}
    assert sorted(best_partition(6, 3, lambda part: float(frozenset(part) in likes))) == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]
    assert best_partition(4, 1, lambda part: 0.0) == [[0, 1, 2, 3]]


def test_a_pooled_checkpoint_trains_and_samples(toy_data, toy_run, tmp_path, capsys):
    train.main(command(*toy_run, n_kv_head=4))
    convert.main(command("pool", out_dir=tmp_path / "run", n_kv_head=1, new_dir=tmp_path / "mqa"))
    train.main(
        command(
            init_from=tmp_path / "mqa",
            out_dir=tmp_path / "up",
            dataset=toy_data,
            device="cpu",
            max_steps=3,
            tokens_per_step=256,
            eval_tokens=256,
        )
    )
    assert load(tmp_path / "up")["config"]["n_kv_head"] == 1
    sample.main(command(out_dir=tmp_path / "up", max_new_tokens=5, device="cpu"))


@pytest.mark.parametrize(
    "args,words",
    [
        ([], "pass --n_kv_head"),
        (["--n_kv_head=3"], "n_kv_head=3 does not divide n_head=4"),
        (["--n_kv_head=0"], "must be at least 1"),
        (["--n_kv_head=2", "--method=median"], "method must be mean or first or random or aligned"),
        (["--n_kv_head=2", "--new_dir=None"], "name a new one with --new_dir"),
        (["--n_kv_head=2", "--new_dir=SELF"], "nothing is overwritten"),
        (["--n_kv_head=2", "--out_dir=/no/run"], "there is no checkpoint /no/run/ckpt.pt"),
        (["--n_kv_heda=2"], "did you mean n_kv_head?"),
    ],
)
def test_bad_input_of_pool(tmp_path, capsys, args, words):
    source = save(toy_model(n_kv_head=4), tmp_path / "from")
    args = [arg.replace("SELF", source) for arg in args]
    before = (tmp_path / "from/ckpt.pt").read_bytes()
    assert words in fails(
        convert.main,
        ["pool", f"--out_dir={source}", f"--new_dir={tmp_path / 'new'}", *args],
        capsys,
    )
    assert not (tmp_path / "new").exists() and (tmp_path / "from/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    "args,words",
    [
        (["--n_kv_head=4", "--dataset=DATA"], "which uses no data"),
        (["--n_kv_head=2", "--dataset=DATA"], "which uses no data"),
        (["--n_kv_head=1", "--dataset=DATA"], "has 257 token ids, and the model 65: pass another data set"),
        (["--n_kv_head=1", "--dataset=SHORT"], "has 48 training tokens, of 49 that are needed: pass another data set"),
        (["--n_kv_head=1", "--dataset=LONG"], "has sequences of 64 tokens, and the model a context of 48: pass"),
    ],
)
def test_what_pool_cannot_use(tmp_path, toy_data, capsys, args, words):
    """Data without an effect was accepted; data that does not fit ended in a traceback."""
    write_dataset([("train", "x" * 47), ("val", "x" * 47)], tmp_path / "short", "byte")
    write_dataset([("train", "x" * 639), ("val", "x" * 639)], tmp_path / "long", "byte", sequence_length=64)
    vocab_size = 65 if "DATA" in args[-1] else 257
    model = toy_model(n_kv_head=2, block_size=48, vocab_size=vocab_size)
    source = save(model, tmp_path / "from", "byte")
    for name, path in (("DATA", toy_data), ("SHORT", tmp_path / "short"), ("LONG", tmp_path / "long")):
        args = [arg.replace(name, str(path)) for arg in args]
    error = fails(convert.main, command("pool", *args, out_dir=source, new_dir=tmp_path / "new"), capsys)
    assert words in error and not (tmp_path / "new").exists()


def test_pool_reads_whole_sequences(tmp_path):
    """A data set whose sequences are longer than 2,048 tokens was refused, with a remedy that did not help."""
    text = "x" * (4 * 2560 - 1)
    write_dataset([("train", text), ("val", "y")], tmp_path / "data", "byte", sequence_length=2560)
    for block_size, length in ((2560, 2560), (48, None), (5120, 2560)):
        before = GPTConfig(vocab_size=257, block_size=block_size)
        state, config = dict(tokenizer="byte"), convert.PoolConfig(dataset=str(tmp_path / "data"))
        if length is None:
            with pytest.raises(UserError, match="sequences of 2560 tokens"):
                convert.pooling_inputs(state, tmp_path, before, config)
        else:
            assert convert.pooling_inputs(state, tmp_path, before, config).shape == (64, length)


def test_heads_that_agree_where_the_inputs_lie_pool_without_loss():
    """Heads 0 and 1 differ, as do 2 and 3, but not for inputs in a space of 20 of the 32 dimensions."""
    model = toy_model(n_kv_head=4, qk_norm=False)
    heads = nanogqa.pool.split_heads(model.state_dict(), "layers.0.attn.", model.config)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator).double())[0]
    space, outside = basis.split((20, 12), dim=1)
    for x in (heads.k, heads.v):
        x[[1, 3]] = x[[0, 2]] + 10 * torch.randn(2, 8, 12, generator=generator).double() @ outside.T
    errors = []
    sizes = torch.linspace(1, 9, 20).double()  # mean squares of the inputs
    for moment in (space * sizes @ space.T, None):
        new, error = nanogqa.pool.aligned(heads, 2, False, moment), 0.0
        for h in range(4):
            for a, b in ((heads.q[h].T @ heads.k[h], new.q[h].T @ new.k[h // 2]),
                         (heads.o[h] @ heads.v[h], new.o[h] @ new.v[h // 2])):
                error = max(error, ((a @ space - b @ space).norm() / (a @ space).norm()).item())
        errors.append(error)
    assert errors[0] < 0.02 < 0.2 < errors[1]


def test_pool_weighs_by_the_inputs_of_a_data_set(tmp_path, toy_data):
    model = toy_model(n_kv_head=4, vocab_size=257, qk_norm=False)
    source = save(model, tmp_path / "from", "byte")
    convert.main(command("pool", out_dir=source, new_dir=tmp_path / "new", n_kv_head=2, dataset=toy_data))
    new = loaded(tmp_path / "new")
    ids = convert.pooling_inputs(dict(tokenizer="byte"), tmp_path, model.config, convert.PoolConfig(dataset=toy_data))
    for layer, block in enumerate(model.layers):
        inputs = []
        hook = block.attn.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        logits(model, ids)
        hook.remove()
        x = inputs[0].flatten(0, 1).double()                # all sequences at once
        prefix = f"layers.{layer}.attn."
        heads = nanogqa.pool.split_heads(model.state_dict(), prefix, model.config)
        expected = nanogqa.pool.aligned(heads, 2, False, x.T @ x / len(x))
        found = nanogqa.pool.split_heads(new.state_dict(), prefix, new.config)
        root = nanogqa.pool.square_root(x.T @ x / len(x))[0]
        for h in range(4):  # what scores and outputs depend on, whatever the basis of each head
            for a, b in ((found.q[h].T @ found.k[h // 2], expected.q[h].T @ expected.k[h // 2]),
                         (found.o[h] @ found.v[h // 2], expected.o[h] @ expected.v[h // 2])):
                assert ((a - b) @ root).norm() < 1e-3 * (b @ root).norm()


def test_data_and_a_checkpoint_with_the_older_name_of_a_tokenizer_fit(tmp_path):
    """pool renamed the checkpoint's alone, and refused data that train.py accepts."""
    write_dataset([("train", "x" * 99), ("val", "y")], tmp_path / "data", "byte")
    path = tmp_path / "data/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"tokenizer": "tokenizer.json-0123"}))
    config = convert.PoolConfig(dataset=str(tmp_path / "data"))
    before = GPTConfig(vocab_size=257, block_size=48)
    ids = convert.pooling_inputs(dict(tokenizer="tokenizer.json-0123"), tmp_path, before, config)
    assert ids.shape == (64, 48)


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    """It passed the first check, and could not be replaced after all the work."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "disk")
    with convert.replacing_folder(tmp_path / "new", "new_dir") as folder:
        (folder / "file").touch()
    assert (tmp_path / "disk/file").exists() and (tmp_path / "new").is_symlink()


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "q_proj", "o_proj"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_pruned_heads_pool(part, qk_norm):
    """Keys or values of zeros gave weights that are not finite."""
    model = toy_model(n_kv_head=4, qk_norm=qk_norm)
    heads = nanogqa.pool.split_heads(model.state_dict(), "layers.0.attn.", model.config)
    getattr(heads, part[0])[:] = 0
    new = nanogqa.pool.aligned(heads, 2, qk_norm, None)
    for x in (new.q, new.k, new.v, new.o):
        assert x.float().isfinite().all()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_pruned_heads_are_grouped_by_what_is_left(qk_norm):
    """Keys or values of zeros gave the order of heads as their grouping. Heads 0 and 2 are equal, as are 1 and 3."""
    keys, values = torch.randn(2, 2, 8, 32).repeat(1, 2, 1, 1).double()
    for used_keys, used_values in ((0 * keys, values), (keys, 0 * values)):
        planes = nanogqa.pool.to_planes(used_keys, qk_norm)
        assert sorted(nanogqa.pool.groups_of_heads(planes, used_values, 2)) == [[0, 2], [1, 3]]


def test_heads_wider_than_their_inputs_pool(tmp_path):
    """The new values had too few rows. Copies of one head pool to that head without loss."""
    model = toy_model(n_head=4, n_kv_head=1, n_embd=16, head_dim=24)
    source = save(model, tmp_path / "one")
    convert.main(command("pool", out_dir=source, new_dir=tmp_path / "four", n_kv_head=4))
    convert.main(command("pool", out_dir=tmp_path / "four", new_dir=tmp_path / "again", n_kv_head=1))
    ids = toy_ids(1, 40)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "again"), ids), logits(model, ids), atol=1e-3, rtol=1e-3
    )


def test_the_new_folder_is_checked_before_the_work(tmp_path, capsys, monkeypatch):
    """pool decomposed all layers, and from_hf read all weights, before they refused the folder."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").touch()
    for name in ("load_checkpoint", "read_weights", "read_json"):
        monkeypatch.setattr(convert, name, None)
    for words, key in ((["to_hf"], "hf_dir"), (["pool"], "new_dir"), (["from_hf", f"--hf_dir={tmp_path}"], "out_dir")):
        error = fails(convert.main, [*words, f"--{key}={tmp_path / 'old'}"], capsys)
        assert "nothing is overwritten" in error


def test_heads_that_do_not_nest(tmp_path, capsys):
    source = save(toy_model(n_head=6, n_kv_head=3, n_embd=48), tmp_path / "from")
    error = fails(
        convert.main,
        command("pool", out_dir=source, n_kv_head=2, new_dir=tmp_path / "new"),
        capsys,
    )
    assert "has 3 key/value heads, which 2 neither divides nor is a multiple of" in error


@dataclass
class ConfigWithMore(GPTConfig):
    """GPTConfig with settings that a researcher might add."""

    attn_gate: bool = False
    logit_cap: float | None = None


def save_with(model, folder, **changes):
    """Saves model as a checkpoint of ConfigWithMore with these settings."""
    config = asdict(ConfigWithMore(**{**asdict(model.config), **changes}))
    state = torch.load(Path(save(model, folder)) / "ckpt.pt", weights_only=True)
    saver.save(folder, {**state, "config": config})
    return str(folder)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(attn_gate=True), "attn_gate=True cannot be exported"),
        (dict(logit_cap=30.0), "logit_cap=30.0 cannot be exported"),
    ],
    ids=["attn_gate", "logit_cap"],
)
def test_to_hf_refuses_a_setting_without_a_rule(
    tmp_path, capsys, monkeypatch, attention, changes, words
):
    monkeypatch.setattr(convert, "GPTConfig", ConfigWithMore)
    source = save_with(toy_model(attention=attention), tmp_path / "ours", **changes)
    error = fails(convert.main, command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"), capsys)
    assert words in error and not list(tmp_path.glob("hf*"))


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(kv_tied=True), "kv_tied=True cannot be exported"),
        (dict(kv_share=2), "kv_share=2 cannot be exported"),
        (dict(rope_fraction=0.5), "rope_fraction=0.5 cannot be exported"),
        (dict(attention="mla", window=9), "window=9 cannot be exported"),
        (dict(qk_norm=False, window=9, global_every=2), "window=9 in some layers cannot be"),
    ],
    ids=str,
)
def test_to_hf_refuses_what_no_family_there_has(tmp_path, capsys, changes, words):
    source = save(toy_model(**changes), tmp_path / "ours")
    error = fails(convert.main, command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"), capsys)
    assert words in error and not list(tmp_path.glob("hf*"))


def test_pool_keeps_windows(tmp_path, capsys):
    """They do not concern heads: copies of heads are the same function, with its windows."""
    model = toy_model(n_kv_head=2, window=9, global_every=2)
    source = save(model, tmp_path / "ours")
    convert.main(command("pool", out_dir=source, new_dir=tmp_path / "new", n_kv_head=4))
    ids = toy_ids(1, 40)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "new"), ids), logits(model, ids), atol=1e-4, rtol=1e-4
    )


def test_pool_refuses_a_checkpoint_without_its_tokenizer(tmp_path, capsys):
    source = save(toy_model(n_kv_head=2), tmp_path / "ours")
    state = torch.load(Path(source) / "ckpt.pt")
    torch.save(dict(state, tokenizer="tokenizer.json 0123456789abcdef"), Path(source) / "ckpt.pt")
    arguments = command("pool", out_dir=source, new_dir=tmp_path / "new", n_kv_head=4)
    assert "tokenizer" in fails(convert.main, arguments, capsys) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes,layers", [
    (dict(), "no"), (dict(window=9), "all"), (dict(window=9, global_every=2), "some"),
    (dict(window=9, global_every=1), "no")])
def test_windows_are_named_by_the_layers_that_have_them(changes, layers):
    config = GPTConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=32, **changes)
    assert windows_of(config) == layers


@pytest.mark.parametrize("changes,window,global_every", [
    (dict(use_sliding_window=True, max_window_layers=0, sliding_window=9), 9, 0),
    (dict(use_sliding_window=True, max_window_layers=4, sliding_window=9), None, 0),
    (dict(use_sliding_window=True, sliding_window=9), None, 0), (dict(use_sliding_window=True, max_window_layers=0), 4096, 0),
    (dict(sliding_window=9, max_window_layers=0), None, 0)], ids=str)
def test_windows_of_qwen_without_layer_types(changes, window, global_every):
    """The rule of transformers' Qwen2Config, whose defaults are 4,096 tokens and 28 layers without a window."""
    hf = dict(model_type="qwen2", **changes)
    size = hf.get("sliding_window", 4096)
    types = nanogqa.hf_model.types_of(hf, 4, size)
    expected = {} if window is None else {"window": window, "global_every": global_every}
    assert nanogqa.hf_model.window_settings(hf, types, size) == expected
    configuration = pytest.importorskip("transformers").Qwen2Config(num_hidden_layers=4, **changes)
    assert configuration.layer_types == types


@pytest.mark.parametrize("changes,words", [
    (dict(kv_tied=True), "kv_tied=True"), (dict(kv_share=2), "kv_share=2"), (dict(rope_fraction=0.5), "rope_fraction=0.5")], ids=str)
def test_pool_refuses_other_designs_of_the_cache(tmp_path, capsys, changes, words):
    source = save(toy_model(n_kv_head=4, **changes), tmp_path / "ours")
    arguments = command("pool", out_dir=source, new_dir=tmp_path / "new", n_kv_head=2)
    assert f"{words} cannot be pooled" in fails(convert.main, arguments, capsys)
    assert not list(tmp_path.glob("new*"))


def test_pool_refuses_a_setting_without_a_rule(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "GPTConfig", ConfigWithMore)
    source = save_with(toy_model(n_kv_head=4), tmp_path / "ours", attn_gate=True)
    arguments = command("pool", out_dir=source, new_dir=tmp_path / "new", n_kv_head=2)
    assert "attn_gate=True cannot be pooled" in fails(convert.main, arguments, capsys)
    assert not list(tmp_path.glob("new*"))


def test_settings_at_their_default_need_no_rule(transformers, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "GPTConfig", ConfigWithMore)
    source = save_with(toy_model(n_kv_head=4, dropout=0.1), tmp_path / "ours")
    convert.main(command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"))
    convert.main(command("pool", out_dir=source, new_dir=tmp_path / "new", n_kv_head=2))
    assert (tmp_path / "hf/config.json").exists() and (tmp_path / "new/ckpt.pt").exists()


def test_the_rules_name_settings_that_exist():
    named = convert.POOLABLE | EXPORTABLE["gqa"] | EXPORTABLE["mla"]
    assert named <= set(keys_of(GPTConfig))


def test_to_hf_refuses_an_attention_without_a_rule(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(EXPORTABLE, "mla")
    source = save(toy_model(attention="mla"), tmp_path / "ours")
    error = fails(convert.main, command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"), capsys)
    assert "attention=mla cannot be exported" in error and not list(tmp_path.glob("hf*"))


def test_pooling_knows_tensors_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(nanogqa.pool.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported <= {"dataclasses", "torch"}


def test_an_unknown_conversion(capsys):
    assert "begin with to_hf, from_hf, pool" in fails(convert.main, [], capsys)
    assert "begin with to_hf, from_hf, pool" in fails(convert.main, ["onnx"], capsys)
    convert.main(["--help"])
    out = capsys.readouterr().out
    assert all(key in out for key in ("--hf_dir", "--new_dir", "--method", "--dtype"))


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(folder, state):
        (folder / "ckpt.pt").write_text("half")
        raise OSError(28, "No space left on device")

    source = save(toy_model(n_kv_head=4), tmp_path / "from")
    monkeypatch.setattr(saver, "save", full)
    assert "No space left" in fails(
        convert.main,
        command("pool", out_dir=source, n_kv_head=2, new_dir=tmp_path / "new"),
        capsys,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


# -- llama3's RoPE -------------------------------------------------------------------------------


def test_llama3_frequencies_equal_the_formula_by_cases():
    config = GPTConfig(
        head_dim=64, rope_theta=5e5, rope_factor=8.0, rope_original_block_size=8192, vocab_size=9
    )
    for i, got in enumerate(rope_frequencies(config).tolist()):
        f = 5e5 ** (-2 * i / 64)
        wavelength = 2 * math.pi / f
        s = (8192 / wavelength - 1) / (4 - 1)
        expected = (
            f
            if wavelength < 8192 / 4
            else f / 8
            if wavelength > 8192 / 1
            else (1 - s) * f / 8 + s * f
        )
        assert got == pytest.approx(expected, rel=1e-5)


# -- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")


TINY = dict(
    vocab_size=101,
    hidden_size=C,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=H,
    num_key_value_heads=K,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SCALING = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
FAMILIES = {
    "llama2": ("Llama", {}),
    "llama_mqa": ("Llama", dict(num_key_value_heads=1)),
    "llama_mha": ("Llama", dict(num_key_value_heads=4)),
    "llama3": ("Llama", dict(rope_parameters=SCALING, tie_word_embeddings=True)),
    "smollm": (
        "Llama",
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=5e4)),
    ),
    "wide_heads": ("Llama", dict(head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=8)),
    "mistral_windows": ("Mistral", dict(sliding_window=9, head_dim=8)),
    "qwen2": ("Qwen2", dict(use_sliding_window=False)),
    "qwen2_windows": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=9, max_window_layers=0),
    ),
    "qwen3_some_windows": (
        "Qwen3",
        dict(
            head_dim=16,
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def make_hf(transformers, folder, family, shard="5GB"):
    """A random tiny model of a family of transformers, saved in folder; every parameter matters."""
    name, changes = FAMILIES[family]
    if transformers.__version__ < "5":  # which separates the base from the scaling
        scaling = dict(changes.get("rope_parameters") or dict(rope_type="default"))
        changes = {**changes, "rope_theta": scaling.pop("rope_theta", 1e4), "rope_scaling": scaling}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**TINY, **changes})
    ).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape) * (0.3 if x.dim() == 1 else 0.15))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def greedy(model, ids, n):
    """ids and the n greedy ids after them, by full forwards of our or transformers' model."""
    for _ in range(n):
        with torch.inference_mode():
            out = model(ids)
        ids = torch.cat(
            (ids, (out[0] if isinstance(out, tuple) else out.logits)[:, -1:].argmax(-1)), dim=1
        )
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_from_hf_has_the_logits_of_transformers(transformers, tmp_path, capsys, family, shard):
    theirs = make_hf(transformers, tmp_path / "hf", family, shard)
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == (shard == "20KB")
    convert.main(command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours"))
    printed = capsys.readouterr()
    assert (
        "largest logit difference to transformers" in printed.out
        and "has no tokenizer" in printed.err
    )
    ours, ids = loaded(tmp_path / "ours"), toy_ids(2, 64, vocab=101)
    assert ours.config.vocab_size == 101 and ours.config.block_size == 64
    with torch.inference_mode():
        expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-4, rtol=0)
    assert torch.equal(greedy(ours, ids[:, :4], 60), greedy(theirs, ids[:, :4], 60))


def test_rope_scaling_wins_over_rope_parameters(transformers, tmp_path):
    """As in transformers 5, which writes the latter: of a file with both, someone has added the former."""
    make_hf(transformers, tmp_path / "hf", "llama3")
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))
    scaling = {key: value for key, value in SCALING.items() if key != "rope_theta"}
    config |= dict(rope_theta=1e4, rope_scaling=scaling, rope_parameters=dict(rope_type="default", rope_theta=1e4))
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    convert.main(command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours"))  # compares the logits
    assert loaded(tmp_path / "ours").config.rope_factor == SCALING["factor"] != 1


def test_rope_written_as_transformers_4_did(transformers, tmp_path):
    theirs = make_hf(transformers, tmp_path / "hf", "llama3")
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))
    for old in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(old, None)
    for scaling in (dict(SCALING), {**SCALING, "type": SCALING["rope_type"]}):
        scaling.pop("rope_theta")
        (tmp_path / "hf/config.json").write_text(
            json.dumps(config | dict(rope_theta=1e4, rope_scaling=scaling))
        )
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        convert.main(command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours"))
        ids = toy_ids(1, 64, vocab=101)
        with torch.inference_mode():
            torch.testing.assert_close(
                logits(loaded(tmp_path / "ours"), ids), theirs(ids).logits, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize(
    "changes",
    [
        dict(qk_norm=True),
        dict(qk_norm=False),
        dict(qk_norm=False, qkv_bias=True),
        dict(qk_norm=True, head_dim=16, tie_embeddings=False, rope_theta=5e4),
        dict(qk_norm=False, rope_factor=8.0, rope_original_block_size=16),
        dict(qk_norm=True, window=9, global_every=2),
        dict(qk_norm=False, window=9),
        dict(qk_norm=False, qkv_bias=True, window=9),
    ],
    ids=["qwen3", "llama", "qwen2", "wide", "llama3", "qwen3-some", "mistral", "qwen2-windows"],
)
def test_to_hf_and_back(transformers, tmp_path, capsys, n_kv_head, changes):
    ours = toy_model(n_kv_head=n_kv_head, **changes)
    with torch.no_grad():
        for x in ours.parameters():
            x.mul_(0.5)  # toy_model's attention is so sharp that rounding alone causes 1e-4
    convert.main(command("to_hf", out_dir=save(ours, tmp_path / "ours"), hf_dir=tmp_path / "hf"))
    assert "positions 0 to 47" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.vocab_size == 65 and theirs.dtype == torch.float32
    ids = toy_ids()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, logits(ours, ids), atol=1e-4, rtol=1e-5)
    assert torch.equal(greedy(ours, ids[:, :3], 45), greedy(theirs, ids[:, :3], 45))
    convert.main(command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "back"))
    back = loaded(tmp_path / "back")
    assert back.config == ours.config
    for name, x in ours.state_dict().items():
        assert torch.equal(x, back.state_dict()[name]), name


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("rope_factor", [1.0, 8.0])
def test_export_has_the_rope_keys_of_transformers_4(transformers, tmp_path, attention, rope_factor):
    """transformers 5 writes rope_parameters alone, which version 4 would silently ignore."""
    model = toy_model(
        attention=attention, rope_theta=5e4, rope_factor=rope_factor, rope_original_block_size=16
    )
    source = save(model, tmp_path / "ours")
    convert.main(command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"))
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == 5e4
    if rope_factor == 1:
        assert config["rope_scaling"] is None
    else:
        assert config["rope_scaling"] == dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )


def test_sizes_that_transformers_refuses(transformers, tmp_path, capsys, monkeypatch):
    def for_model(*args, **kwargs):
        raise ValueError("hidden_size is not a multiple\nof num_attention_heads")

    monkeypatch.setattr(transformers.AutoConfig, "for_model", for_model)
    source = save(toy_model(n_kv_head=2), tmp_path / "ours")
    error = fails(convert.main, command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"), capsys)
    assert "refuses this model (hidden_size is not a multiple of" in error
    assert not list(tmp_path.glob("hf*"))


def test_bfloat16_export(transformers, tmp_path):
    ours = toy_model(n_kv_head=2)
    convert.main(
        command(
            "to_hf", out_dir=save(ours, tmp_path / "ours"), hf_dir=tmp_path / "hf", dtype="bfloat16"
        )
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, ours.embed.weight.bfloat16())


def test_both_biases_and_norms_have_no_architecture(transformers, tmp_path, capsys):
    source = save(toy_model(n_kv_head=2, qkv_bias=True), tmp_path / "ours")
    assert "qk_norm with qkv_bias" in fails(
        convert.main, command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"), capsys
    )
    assert not (tmp_path / "hf").exists()


# small byte-pair encodings, trained by tiktoken's educational code, with the patterns of real ones
TEXT = 3 * (
    "the theatre there; they're 1234567 or 12345 DON'T don'T  HELLO World\n\n  \t x  "
    "ünïcödé ĄŁŻź 漢字 語 🙂 naïve "
)


def encoding_like(name):
    from tiktoken._educational import bpe_train
    from tiktoken_ext import openai_public

    source = openai_public.load_tiktoken_bpe, openai_public.data_gym_to_mergeable_bpe_ranks
    try:
        openai_public.load_tiktoken_bpe = openai_public.data_gym_to_mergeable_bpe_ranks = (
            lambda *args, **kwargs: {}
        )
        about = openai_public.ENCODING_CONSTRUCTORS[name]()
    finally:
        openai_public.load_tiktoken_bpe, openai_public.data_gym_to_mergeable_bpe_ranks = source
    ranks = bpe_train(TEXT + convert.__doc__, 330, about["pat_str"], visualise=None)
    return tiktoken.Encoding(
        name,
        pat_str=about["pat_str"],
        mergeable_ranks=ranks,
        special_tokens={tokenizer.EOT: 333, "<|fim|>": 340},
    )


@pytest.fixture
def toy_bpe(monkeypatch):
    """Makes tiktoken.get_encoding return toy encodings with real patterns, not a download."""
    made = {name: encoding_like(name) for name in ("gpt2", "cl100k_base", "o200k_base")}
    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", made.__getitem__)
    return made


@pytest.mark.parametrize("name", ["byte", "gpt2", "cl100k_base", "o200k_base"])
def test_tokenizers_round_trip(transformers, toy_bpe, tmp_path, name):
    encoding = get_tokenizer(name)
    model = toy_model(n_kv_head=2, vocab_size=350)
    convert.main(
        command("to_hf", out_dir=save(model, tmp_path / "ours", name), hf_dir=tmp_path / "hf")
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (
        TEXT,
        " ",
        "",
        "a",
        "\n\n\n",
        "１２３４ ½ 1,000,000.00",
        "x" * 50,
        f"one{tokenizer.EOT}two",
        "\u00a0\u2003\u200b\u3000.",
    ):
        ids = encoding.encode(text, allowed_special="all")
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == encoding.eot_token
    convert.main(command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "back"))
    assert (
        load(tmp_path / "back")["tokenizer"] == name
        and not (tmp_path / "back/tokenizer.json").exists()
    )


def test_pipeline_generates_what_sample_does(transformers, toy_run, tmp_path, capsys):
    train.main(toy_run)
    convert.main(command("to_hf", out_dir=tmp_path / "run", hf_dir=tmp_path / "hf"))
    capsys.readouterr()
    sample.main(
        command(
            out_dir=tmp_path / "run", prompt="the ", temperature=0, max_new_tokens=20, device="cpu"
        )
    )
    expected = capsys.readouterr().out.removesuffix("\n")
    generator = transformers.pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    assert generator("the ", max_new_tokens=20, do_sample=False)[0]["generated_text"] == expected


def sentencepiece_like(tokenizers):
    """A tokenizer as Llama 2 has it: U+2581 for spaces, bytes by name, a BOS token in front."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    for token in ("\u2581", "t", "h", "e", "n", "\u2581t", "he", "\u2581the", "\u2581then"):
        vocab[token] = len(vocab)
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581the", "n")]
    t = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    t.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    t.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    t.add_special_tokens(["<s>", "</s>"])
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return t


def test_a_tokenizer_that_tiktoken_cannot_express_is_copied(
    transformers, tmp_path, capsys, monkeypatch
):
    """From a Hugging Face folder through data, training and sampling to a Hugging Face folder."""
    import tokenizers

    monkeypatch.setitem(TINY, "vocab_size", 270)
    make_hf(transformers, tmp_path / "hf", "llama2")
    theirs = sentencepiece_like(tokenizers)
    theirs.save(str(tmp_path / "hf/tokenizer.json"))
    convert.main(command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours"))
    name = load(tmp_path / "ours")["tokenizer"]
    assert (
        name.startswith("tokenizer.json ")
        and (tmp_path / "ours/tokenizer.json").read_bytes()
        == (tmp_path / "hf/tokenizer.json").read_bytes()
    )

    encoding = get_tokenizer(name, tmp_path / "ours")
    for text in ("then the ten é 漢", "the</s>then"):
        assert encoding.encode(text) == theirs.encode(text).ids and encoding.encode(text)[0] == 1
        pieces = b"".join(
            encoding.decode_single_token_bytes(i) for i in encoding.encode(text)[1:]
        ).decode()
        assert (
            pieces.removeprefix(" ") == text.replace("</s>t", "</s> t")
            or pieces.removeprefix(" ") == text
        )
    assert 2 not in encoding.encode_ordinary("the</s>then") and encoding.eot_token == 2

    write_dataset(
        [("train", "then the ten " * 60), ("val", "the then " * 30)],
        tmp_path / "data",
        str(tmp_path / "ours"),
    )
    meta = json.loads((tmp_path / "data/meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == name and (tmp_path / "data/tokenizer.json").exists()
    train.main(
        command(
            init_from=tmp_path / "ours",
            out_dir=tmp_path / "tuned",
            dataset=tmp_path / "data",
            block_size=32,
            tokens_per_step=64,
            max_steps=2,
            device="cpu",
        )
    )
    capsys.readouterr()
    sample.main(command(out_dir=tmp_path / "tuned", prompt="the", max_new_tokens=4, device="cpu"))
    assert capsys.readouterr().out.startswith("the")
    convert.main(command("to_hf", out_dir=tmp_path / "tuned", hf_dir=tmp_path / "again"))
    about = json.loads((tmp_path / "again/tokenizer_config.json").read_text(encoding="utf-8"))
    assert about["model_max_length"] == 32, "the model's context, not that of the original"
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (
        tmp_path / "hf/tokenizer.json"
    ).read_bytes()
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("then")["input_ids"]
        == theirs.encode("then").ids
    )

    (tmp_path / "tuned/tokenizer.json").write_text(
        (tmp_path / "tuned/tokenizer.json").read_text(encoding="utf-8") + " "
    )
    sample.main(command(out_dir=tmp_path / "tuned", max_new_tokens=1, device="cpu"))
    theirs.add_tokens(["zebra"])
    theirs.save(str(tmp_path / "tuned/tokenizer.json"))
    assert "it gives other ids" in fails(
        sample.main, command(out_dir=tmp_path / "tuned", device="cpu"), capsys
    )


def tokenizer_folder(tokenizers, folder, **changes):
    """A folder with the tokenizer of sentencepiece_like, and these keys of its JSON replaced."""
    content = json.loads(sentencepiece_like(tokenizers).to_str())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="</s>")))
    return folder


TRUNCATION = dict(direction="Right", max_length=17, strategy="LongestFirst", stride=0)
PADDING = dict(
    strategy=dict(Fixed=40),
    direction="Right",
    pad_to_multiple_of=None,
    pad_id=2,
    pad_type_id=0,
    pad_token="</s>",
)


@pytest.mark.parametrize(
    "changes",
    [
        dict(truncation=TRUNCATION),
        dict(padding=PADDING),
        dict(padding=PADDING | dict(strategy="BatchLongest", direction="Left")),
        dict(truncation=TRUNCATION | dict(direction="Left"), padding=PADDING),
    ],
    ids=["truncation", "padding", "longest", "both"],
)
def test_stored_truncation_and_padding_change_no_text(tmp_path, changes):
    """They once cut 15,631 bytes to 17 tokens: a decoded data set is its text, and so are prompts."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tokenizer_folder(tokenizers, tmp_path / "its", **changes)
    plain = sentencepiece_like(tokenizers)
    encoding = tokenizer.HuggingFaceTokenizer(folder)
    texts = ["the", "then the ten \u00e9 \u6f22 " * 40]
    for text in texts:
        assert encoding.encode(text) == plain.encode(text).ids
        assert encoding.encode_ordinary(text) == plain.encode(text).ids
    assert encoding.encode_ordinary_batch(texts) == [plain.encode(text).ids for text in texts]
    assert encode_prompts(encoding, texts, 270) == [plain.encode(text).ids for text in texts]

    write_dataset([("train", texts[1]), ("val", texts[0])], tmp_path / "data", str(folder))
    ids = np.fromfile(tmp_path / "data/train.bin", dtype="<u2")
    assert ids[0] == 1 and ids[-1] == 2
    pieces = [encoding.decode_single_token_bytes(int(i)) for i in ids[1:-1]]
    assert b"".join(pieces).decode() == " " + texts[1]


def test_without_a_tokenizer(transformers, tmp_path, capsys, toy_data):
    source = save(toy_model(n_kv_head=2, vocab_size=300), tmp_path / "ours")
    convert.main(command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"))
    assert (
        "has no tokenizer" in capsys.readouterr().err
        and not (tmp_path / "hf/tokenizer.json").exists()
    )
    assert "came without a tokenizer" in fails(
        sample.main, command(out_dir=source, device="cpu"), capsys
    )
    assert "no run to resume" in fails(
        train.main, command(out_dir=source, init_from="resume", dataset=toy_data), capsys
    )
    train.main(
        command(
            init_from=source,
            out_dir=tmp_path / "tuned",
            dataset=toy_data,
            max_steps=1,
            device="cpu",
            tokens_per_step=96,
            eval_tokens=96,
        )
    )
    assert load(tmp_path / "tuned")["tokenizer"] == "byte"


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(
            json.dumps(
                {key: value for key, value in {**config, **changes}.items() if value != "DROP"}
            )
        )

    return change


def change_weights(edit):
    def change(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))

    return change


def only_an_index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def cut(n):
    return lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:n]
    )


@pytest.mark.parametrize(
    "change",
    [
        change_config(return_dict=False),
        change_config(attn_implementation="flash_attention_2"),
        change_config(attn_implementation="kernels-community/flash-attn"),
        change_config(partial_rotary_factor=None),
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        ),
    ],
    ids=["tuple", "attention", "kernel", "null", "stale-index"],
)
def test_folders_that_transformers_reads_are_imported(transformers, tmp_path, change):
    """A config.json may not choose the code that runs; transformers prefers the single file to an index."""
    make_hf(transformers, tmp_path / "hf", "llama2")
    change(tmp_path / "hf")
    convert.main(["from_hf", f"--hf_dir={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'run'}"])
    assert load(tmp_path / "run")["model"]


def test_null_takes_the_default_of_transformers(transformers, tmp_path):
    """The number of query heads for key/value heads, the longest context for the one before a llama3 scaling."""
    make_hf(transformers, tmp_path / "hf", "llama2")
    path = tmp_path / "hf/config.json"
    hf = json.loads(path.read_text(encoding="utf-8"))
    scaling = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    for family in ("mistral", "qwen2", "qwen3"):
        changed = hf | dict(model_type=family, num_key_value_heads=None, rope_parameters=scaling, rope_scaling=None)
        config = nanogqa.hf_model.model_config(changed, path, convert.GPTConfig)
        assert config.n_kv_head == config.n_head == hf["num_attention_heads"]
        longest = hf["max_position_embeddings"]
        assert config.rope_original_block_size == config.block_size == longest


@pytest.mark.parametrize(
    "change,words",
    [
        (change_config(model_type="gpt_neox"), "model_type 'gpt_neox' cannot be imported: use a"),
        (change_config(model_type="DROP"), "model_type None"),
        (change_config(model_type=["llama"]), "cannot be imported"),
        (change_config(attention_bias=True), "attention_bias=True cannot be represented"),
        (change_config(mlp_bias=True), "mlp_bias=True"),
        (change_config(hidden_act="gelu"), "hidden_act=gelu"),
        (change_config(model_type="mistral", sliding_window=-16), "sliding_window is -16, which is not a window"),
        (
            change_config(
                model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1
            ),
            "layer_types=full_attention, sliding_attention",
        ),
        (change_config(layer_types=["full_attention"]), "hf/config.json: num_hidden_layers=2, but layer_types lists 1"),
        (change_config(rope_parameters=dict(rope_type="yarn", factor=4.0)), "rope_type=yarn"),
        (
            change_config(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)),
            "the llama3 scaling lacks factor",
        ),
        (change_config(rope_parameters=[1]), "rope_parameters is a list, not of type dict"),
        (
            change_config(
                rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
            ),
            "partial_rotary_factor",
        ),
        (
            change_config(layer_types=["full_attention", "sliding_attention"]),
            "layer_types=sliding_attention",
        ),
        (change_config(quantization_config=dict(bits=4)), "quantization_config"),
        (change_config(hidden_size="DROP"), "lacks hidden_size"),
        (change_config(hidden_size="wide"), "n_embd must be a whole number"),
        (change_config(hidden_size=10**17), "asks for sizes that no machine can hold"),
        (change_config(num_hidden_layers=1), "which this model does not have"),
        (change_config(num_hidden_layers=3), "has no tensor model.layers.2."),
        (
            change_config(intermediate_size=64),
            "has shape [48, 32] where config.json promises [64, 32]",
        ),
        (change_config(model_type="qwen3", head_dim="DROP"), "lacks head_dim"),
        (change_config(vocab_size=0), "vocab_size must be at least 1"),
        (change_weights(lambda w: w.pop("model.norm.weight")), "has no tensor model.norm.weight"),
        (
            change_weights(
                lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(C)})
            ),
            "q_proj.bias, which this model does not have",
        ),
        (
            change_weights(lambda w: w.update({"model.norm.weight": torch.zeros(C + 1)})),
            "model.norm.weight has shape [33] where config.json promises [32]",
        ),
        (change_weights(lambda w: w["model.norm.weight"].fill_(torch.nan)), "model.norm.weight has values that are not finite"),
        (cut(0), "cannot be read"),
        (cut(5), "cannot be read"),
        (cut(1000), "cannot be read"),
        (cut(-1), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "cannot read"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            "tokenizer.json cannot be read",
        ),
        (
            only_an_index('{"weight_map": {"a": "../none.safetensors"}}'),
            "is '../none.safetensors', which is not a base name",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"),
            "tokenizer.json cannot be read",
        ),
    ],
)
def test_bad_folders_of_hugging_face(transformers, tmp_path, capsys, change, words):
    make_hf(transformers, tmp_path / "hf", "llama2")
    change(tmp_path / "hf")
    error = fails(
        convert.main,
        command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours"),
        capsys,
    )
    assert words in error.splitlines()[-1] and not list(tmp_path.glob("ours*"))


def test_a_model_that_transformers_cannot_run(transformers, tmp_path, capsys, monkeypatch):
    """What a config.json breaks in the forward pass alone ended in a traceback."""
    make_hf(transformers, tmp_path / "hf", "llama2")

    def forward(self, *args, **kwargs):
        raise TypeError("'int' object is not iterable")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    arguments = command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours")
    error = fails(convert.main, arguments, capsys)
    assert "cannot load or run" in error and "'int' object is not iterable" in error and not list(tmp_path.glob("ours*"))


def test_folders_that_are_missing_or_taken(transformers, tmp_path, capsys):
    source = save(toy_model(n_kv_head=2), tmp_path / "ours")
    assert "there is no folder /no/hf" in fails(
        convert.main, command("from_hf", hf_dir="/no/hf", out_dir=tmp_path / "x"), capsys
    )
    assert "nothing is overwritten" in fails(
        convert.main, command("to_hf", out_dir=source, hf_dir=source), capsys
    )
    assert "name a new one with --hf_dir" in fails(
        convert.main, command("to_hf", out_dir=source), capsys
    )
    make_hf(transformers, tmp_path / "hf", "llama2")
    assert "nothing is overwritten" in fails(
        convert.main, command("from_hf", hf_dir=tmp_path / "hf", out_dir=source), capsys
    )


def test_a_difference_to_transformers_is_an_error(transformers, tmp_path, capsys, monkeypatch):
    """Logits reveal what the list of refused keys misses: here, weights permuted as if RoPE rotated
    neighbours."""
    make_hf(transformers, tmp_path / "hf", "llama2")
    read = convert.read_weights

    def interleaved(folder, config, GPT):
        weights = read(folder, config, GPT)
        return {
            name: x.view(-1, 2, D // 2, C).transpose(1, 2).reshape(x.shape)
            if "k_proj" in name or "q_proj" in name
            else x
            for name, x in weights.items()
        }

    monkeypatch.setattr(convert, "read_weights", interleaved)
    error = fails(
        convert.main,
        command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours"),
        capsys,
    )
    assert "differ by" in error and not list(tmp_path.glob("ours*"))


def test_lm_eval_reads_the_export(transformers, toy_run, tmp_path):
    """A task of three local lines: the harness's likelihoods are those of our own model."""
    lm_eval = pytest.importorskip("lm_eval")
    train.main(toy_run)
    convert.main(command("to_hf", out_dir=tmp_path / "run", hf_dir=tmp_path / "hf"))
    rows = [
        dict(question="the", choices=[" a", " e"], answer=0),
        dict(question="on", choices=[" t", " x"], answer=1),
        dict(question="e", choices=[" n", " o"], answer=0),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dict(
        task="toy",
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(tmp_path / "rows.jsonl"))),
        test_split="test",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[dict(metric="acc")],
    )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'hf'},dtype=float32",
        tasks=[task],
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    model, encoding, right = loaded(tmp_path / "run"), get_tokenizer("byte"), 0
    for row, logged in zip(rows, results["samples"]["toy"]):
        likelihoods = []
        for choice in row["choices"]:
            context, ids = (
                encoding.encode(row["question"]),
                encoding.encode(row["question"] + choice),
            )
            log_probs = logits(model, torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            likelihoods.append(
                sum(log_probs[i - 1, ids[i]].item() for i in range(len(context), len(ids)))
            )
        assert [x[0][0] for x in logged["resps"]] == pytest.approx(likelihoods, abs=1e-3)
        right += max(range(2), key=likelihoods.__getitem__) == row["answer"]
    assert results["results"]["toy"]["acc,none"] == pytest.approx(right / 3)
