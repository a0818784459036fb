"""Multi-head latent attention: against the paper's formulas, and one way of computing it against the other."""
import json
import math

import pytest
import torch
from conftest import check_ragged, toy_config, toy_ids, toy_model
from torch.nn import functional as F

import bench
import compare
import convert
import model as model_module
import sample
import train
from model import GPT, GPTConfig, LatentAttention
from nanogqa.cache import KVCache
from nanogqa.configurator import UserError, build, parse
from nanogqa.costs import (
    Decoding,
    decoding_bytes,
    flops_per_token,
    kv_bytes_per_token,
    num_params,
)
from nanogqa.fast import prepare_for_decoding
from nanogqa.runtime import compile_for_decoding, pick_runtime
from sample import generate
from train import TrainConfig

SHAPES = {"default": {}, "query-latent": dict(q_lora_rank=12),
          "odd-sizes": dict(kv_lora_rank=9, rope_head_dim=10, nope_head_dim=6, v_head_dim=5, tie_embeddings=False, head_dim=6),
          "wide-values": dict(q_lora_rank=7, nope_head_dim=4, rope_head_dim=4, v_head_dim=8, qk_norm=False),
          "window": dict(window=5)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


def mla_model(**changes):
    """A toy model whose scores are not so large that attention sees one token alone: no norm holds queries down here, and
    without qk_norm none holds the latents down."""
    model = toy_model(attention="mla", **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "q_b_proj.weight")):
                parameter.div_(20)
            elif "_a_proj" in name and not model.config.qk_norm:
                parameter.div_(10)
    return model


def reference_logits(model, ids):
    """One sequence in float64 by equations 37 to 47 of arXiv 2405.04434, one head and one pair of positions at a time."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    H, R, P, N, U = c.n_head, c.kv_lora_rank, c.rope_head_dim, c.nope_head_dim, c.v_head_dim

    def norm(x, name, eps=c.norm_eps):
        return x / math.sqrt((x * x).mean() + eps) * w[name + ".weight"] if name + ".weight" in w else x

    def rope(x, t):
        angle = [t * c.rope_theta ** (-2 * i / P) for i in range(P // 2)]
        turn = torch.zeros(P, P, dtype=torch.float64)  # as the matrix that it is
        for i, a in enumerate(angle):
            j = i + P // 2
            turn[i, i] = turn[j, j] = math.cos(a)
            turn[i, j], turn[j, i] = -math.sin(a), math.sin(a)
        return turn @ x

    xs = [w["embed.weight"][i] for i in ids.tolist()]
    for layer in range(c.n_layer):
        p = f"layers.{layer}.attn."
        h = [norm(x, f"layers.{layer}.attn_norm") for x in xs]
        queries = w[p + "q_proj.weight"] if c.q_lora_rank is None else w[p + "q_b_proj.weight"]
        up = w[p + "kv_b_proj.weight"]
        q, k, v = [], [], []
        for t, x in enumerate(h):
            source = x if c.q_lora_rank is None else norm(w[p + "q_a_proj.weight"] @ x, p + "q_a_norm", 1e-6)
            down = w[p + "kv_a_proj.weight"] @ x
            latent, shared = norm(down[:R], p + "kv_a_norm", 1e-6), rope(down[R:], t)
            heads = [(queries @ source)[i * (N + P):(i + 1) * (N + P)] for i in range(H)]
            q.append([torch.cat((head[:N], rope(head[N:], t))) for head in heads])
            made = [(up @ latent)[i * (N + U):(i + 1) * (N + U)] for i in range(H)]
            k.append([torch.cat((head[:N], shared)) for head in made])
            v.append([head[N:] for head in made])
        for t in range(len(xs)):
            outs = []
            for i in range(H):
                seen = range(max(0, t + 1 - (c.window or t + 1)), t + 1)
                weights = torch.stack([q[t][i] @ k[j][i] for j in seen]).div(math.sqrt(N + P)).softmax(0)
                outs.append(sum(weight * v[j][i] for weight, j in zip(weights, seen, strict=True)))
            xs[t] = xs[t] + w[p + "o_proj.weight"] @ torch.cat(outs)
            y = norm(xs[t], f"layers.{layer}.mlp_norm")
            mlp = [w[f"layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
            xs[t] = xs[t] + mlp[2] @ (F.silu(mlp[0] @ y) * (mlp[1] @ y))
    return torch.stack([w.get("lm_head.weight", w["embed.weight"]) @ norm(x, "norm") for x in xs])


def test_latents_have_an_eps_of_their_own():
    test_logits_equal_the_formulas_of_the_paper(dict(norm_eps=0.5, q_lora_rank=12))


def test_logits_equal_the_formulas_of_the_paper(shape):
    model, ids = mla_model(**shape), toy_ids(1, 12)
    expected = reference_logits(model, ids[0])
    assert expected.std() > 0.5, "a model whose logits hardly differ would prove nothing"
    torch.testing.assert_close(model(ids)[0][0].double(), expected, atol=1e-4, rtol=1e-4)
    cache = KVCache(model.config, 1, 12)
    with torch.inference_mode():
        absorbed = torch.cat([model(ids[:, t:t + 1], cache=cache)[0][0] for t in range(12)])
    torch.testing.assert_close(absorbed.double(), expected, atol=1e-4, rtol=1e-4)


CHUNKS = {"one-shot": [48], "longer-than-the-latent": [3, 20, 17, 8], "chunked": [7, 16, 1, 9, 15], "token-by-token": [1] * 48, "prefill-decode": [40] + [1] * 8}


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_expanded_equals_absorbed(shape, chunks, static):
    """Attention is expanded without a cache and for more than R = 16 tokens, where keys and values come from the
    cached latents; at the start of a growing cache too, and absorbed otherwise."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-6)):  # RoPE's angles are in float32
        model, ids = mla_model(**shape).to(dtype), toy_ids(3, 48)
        with torch.inference_mode():
            full = model(ids)[0]
            cache = KVCache(model.config, 3, 48, torch.empty(0, dtype=dtype), static=static)
            out = torch.cat([model(part, cache=cache)[0] for part in ids.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(out, full, atol=tolerance, rtol=tolerance)
        assert cache.length == 48


def test_which_way_is_taken(monkeypatch):
    """Expanded attention reads as many heads of keys as there are queries, absorbed one, without copies. R is 16."""
    seen, attend = [], model_module.attend
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, *rest, **options: seen.append(
        (k.shape[1], k.shape[3], k is v)) or attend(q, k, v, *rest, **options))
    model, ids = mla_model(n_layer=1), toy_ids(2, 26)
    expanded, absorbed = (4, 12, False), (1, 24, True)
    with torch.inference_mode():
        for static, padding, expected in ((False, None, [expanded, absorbed, expanded, absorbed]),
                                          (True, None, [absorbed, absorbed, expanded, absorbed]),
                                          (False, torch.tensor([0, 2]), [absorbed, absorbed, expanded, absorbed])):
            cache = KVCache(model.config, 2, 26, static=static)
            cache.padding = padding
            for part in ids.split([5, 3, 17, 1], dim=1):
                model(part, cache=cache)
            assert seen == expected
            seen.clear()
        model(ids)
    assert seen == [expanded]


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("chunks", [[12, 1, 1, 1], [5, 4, 3, 2, 1], [1] * 15], ids=str)
def test_rows_of_unequal_length_equal_themselves_alone(chunks, static):
    check_ragged(mla_model(q_lora_rank=12), chunks, static)


def test_the_cache_is_one_latent_and_one_key():
    """On the tensors themselves: (R + P) x 4 bytes x layers for a token, no values, no heads."""
    for changes, width in (({}, 16 + 8), (dict(kv_lora_rank=9, rope_head_dim=10), 19)):
        model = mla_model(**changes)
        for static in (False, True):
            cache = KVCache(model.config, 3, 20, static=static)
            assert [len(tensors) for tensors in cache.layers] == [1, 1]
            held = [x for tensors in cache.layers for x in tensors]
            assert [tuple(x.shape) for x in held] == [(3, 1, 20, width)] * 2
            assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in held)
            assert cache.nbytes == 3 * 20 * width * 4 * 2
            assert cache.nbytes == 60 * kv_bytes_per_token(model.config)
            assert cache.nbytes == 2 * 60 * kv_bytes_per_token(model.config, torch.bfloat16)
            assert cache.nbytes == decoding_bytes(model, Decoding(3, 5, 20))["cache"]
    cache = KVCache(mla_model().config, 1, 8)
    kept, = cache.append(0, torch.ones(1, 1, 5, 24))
    assert kept.data_ptr() == cache.layers[0][0].data_ptr()
    assert kept.shape == (1, 1, 5, 24)


@pytest.mark.parametrize("rank", [None, 12])
def test_costs_equal_a_hand_count(rank):
    """2 layers, width 32, MLP 64, vocabulary 65, 4 heads: latent 16, rotary part of a key 8, the
    rest of a key 4, values 8."""
    model = mla_model(q_lora_rank=rank)
    queries = 32 * 4 * 12 if rank is None else 32 * 12 + 12 * 4 * 12
    keys_and_values = 32 * (16 + 8) + 16 * 4 * (4 + 8)
    matrices = 2 * (queries + keys_and_values + 4 * 8 * 32 + 3 * 32 * 64)
    norms = 2 * (32 + 32 + 16 + (rank or 0)) + 32
    assert num_params(model) == matrices + norms + 65 * 32
    products = 6 * (matrices + 65 * 32)
    assert flops_per_token(model, 10) == products + 2 * 3 * 10 * 2 * 4 * (12 + 8)
    assert kv_bytes_per_token(model.config) == 2 * (16 + 8) * 4
    bound = decoding_bytes(model, Decoding(1, 5, 10, dtype=torch.bfloat16))
    assert bound["weights"] == 2 * (matrices + norms + 65 * 32)


def test_every_parameter_learns(shape):
    model, ids = mla_model(**shape), toy_ids(2, 24)
    model(ids, ids.roll(-1, 1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


def test_the_other_attention_is_untouched():
    """Names and values of a GQA model's weights, and what MLA shares with them."""
    gqa, mla = (dict(GPT(toy_config(attention=kind), seed=5).named_parameters()) for kind in ("gqa", "mla"))
    assert not any("kv_" in name for name in gqa)
    same = [name for name in gqa if name in mla and gqa[name].shape == mla[name].shape]
    assert all(torch.equal(gqa[name], mla[name]) for name in same) and "layers.1.attn.o_proj.weight" in same
    assert not any(isinstance(module, LatentAttention) for module in GPT(toy_config()).modules())


@pytest.mark.parametrize("changes,words", [
    (dict(n_kv_head=2), "n_kv_head=2 is for attention=gqa: leave n_kv_head out"),
    (dict(qkv_bias=True), "qkv_bias=True is for attention=gqa"),
    (dict(rope_head_dim=5), "rope_head_dim=5 is odd"),
    (dict(head_dim=6, rope_head_dim=3), "rope_head_dim=3 is odd"),
    (dict(kv_lora_rank=0), "kv_lora_rank must be at least 1, not 0"),
    (dict(q_lora_rank=-1), "q_lora_rank must be at least 1, not -1"),
    (dict(v_head_dim=13), "v_head_dim=13 is more than nope_head_dim + rope_head_dim = 12"),
    (dict(attention="gqa", kv_lora_rank=8), "kv_lora_rank=8 is for attention=mla"),
    (dict(attention="gqa", v_head_dim=8), "v_head_dim=8 is for attention=mla"),
])
def test_impossible_shapes_are_named(changes, words):
    with pytest.raises(ValueError) as error:
        toy_config(**{"attention": "mla", **changes})
    assert words in str(error.value)


def test_derived_defaults_are_those_of_deepseek_where_heads_are_wide():
    c = GPTConfig(attention="mla", n_embd=768, n_head=12)
    assert (c.kv_lora_rank, c.q_lora_rank, c.rope_head_dim, c.nope_head_dim, c.v_head_dim) == (256, None, 32, 64, 64)
    for n_embd, n_head, widths in ((4096, 32, (512, 64, 128)), (128, 4, (64, 32, 16)), (144, 4, (72, 32, 22)), (24, 4, (12, 6, 3))):
        c = GPTConfig(attention="mla", n_embd=n_embd, n_head=n_head)
        assert (c.kv_lora_rank, c.rope_head_dim, c.nope_head_dim) == widths and c.rope_head_dim + c.nope_head_dim == 3 * c.head_dim // 2
    assert toy_config(attention="mla", n_kv_head=4) == toy_config(attention="mla") == GPTConfig(**vars(toy_config(attention="mla")))
    given = parse(TrainConfig, ["config/gpt2_124m.py", "config/mla.py"], "")
    composed = build(TrainConfig, given)
    assert (composed.attention, composed.out_dir, composed.kv_lora_rank) == ("mla", "out/gpt2_124m/mla", 256)
    with pytest.raises(UserError, match="n_kv_head=2 is for attention=gqa"):
        build(TrainConfig, parse(TrainConfig, ["config/mla.py", "config/gqa.py"], ""))


# -- decoding ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_prepared_weights_give_the_same_logits(shape, tied):
    model, ids = mla_model(**{**shape, "tie_embeddings": tied}), toy_ids(2, 20)
    expected = model(ids)[0].detach()
    prepared = prepare_for_decoding(model, 2)
    with torch.inference_mode():
        cache = KVCache(prepared.config, 2, 20)
        out = torch.cat([prepared(part, cache=cache)[0] for part in ids.split([13, 1, 1, 5], dim=1)], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompts", [1, 3], ids=["one", "ragged"])
def test_compiled_decoding_is_one_graph_for_prompts_and_one_for_tokens(graphs, prompts):
    model = mla_model(block_size=128, tie_embeddings=False, q_lora_rank=12)
    prompts = [toy_ids(1, n, seed=n)[0].tolist() for n in (20, 5, 33)[:prompts]]
    compiled = compile_for_decoding(model, pick_runtime("cpu", "float32", True))
    plain = list(generate(model, prompts, 40, temperature=0))
    assert list(generate(model, prompts, 40, temperature=0, compiled=compiled)) == plain
    assert len(graphs) == 2


def test_decode_and_train_are_timed_and_accounted(capsys):
    shape = ["--device=cpu", "--n_layer=2", "--n_head=4", "--n_embd=32", "--vocab_size=65",
             "--dtype=float32"]

    def result(*args):
        bench.main([*shape, *args])
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    gqa, mla = result("--attention=gqa,mla", "--batch_size=3", "--prompt_len=10", "--new_tokens=6",
                      "--repeats=1")["rows"]
    assert (gqa["attention"], mla["attention"]) == ("gqa", "mla")
    assert gqa["kv_cache_bytes"] == 3 * 16 * 2 * 2 * 32 * 4
    assert mla["kv_cache_bytes"] == 3 * 16 * 2 * 24 * 4
    attention = 32 * 48 + 32 * 24 + 16 * 48 + 32 * 32 + 16
    weights = 65 * 32 + 2 * (attention + 3 * 32 * 96 + 2 * 32) + 32
    assert mla["bytes_per_step"] == 4 * weights + 3 * 13 * 2 * 24 * 4
    assert 0 < mla["mbu"] < 1
    assert mla["memory_bound_bytes"] > 4 * weights
    rows = result("--attention=gqa,mla", "--n_kv_head=4,1", "--kv_lora_rank=8,16",
                  "--new_tokens=2", "--repeats=1")["rows"]
    sizes = [(row["n_kv_head"], row["kv_lora_rank"]) for row in rows]
    assert sizes == [(4, None), (1, None), (None, 8), (None, 16)]
    row = result("--attention=mla", "--prefill=False", "--prompt_len=50", "--new_tokens=2",
                 "--repeats=1")
    assert row["prefill_s"] is None
    row = result("--attention=mla", "--mode=train", "--batch_size=4", "--block_size=16",
                 "--steps=2")
    assert row["tok_s"] > 0


# -- the programs --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_dir(toy_data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("mla"))
    train.main([f"--dataset={toy_data}", f"--out_dir={folder}", "--device=cpu", "--n_layer=2", "--n_head=4", "--attention=mla",
                "--n_embd=32", "--block_size=32", "--batch_size=8", "--tokens_per_step=256", "--max_steps=60", "--q_lora_rank=16",
                "--eval_interval=60", "--eval_tokens=1024", "--warmup_steps=4", "--learning_rate=1e-2"])
    return folder


def test_text_with_cache_is_the_text_of_full_forwards(run_dir, capsys, tmp_path):
    """Past the end of the context, for one prompt and for a ragged batch; drawn, since the likeliest text is too dull to prove it."""
    (tmp_path / "prompts.txt").write_text("the \na much longer prompt than the first \nx\n")
    for prompts in ("--prompt=the ", f"--prompts={tmp_path / 'prompts.txt'}"):
        outs = []
        for kv_cache in (True, False):
            capsys.readouterr()
            sample.main([f"--out_dir={run_dir}", "--device=cpu", prompts, "--max_new_tokens=60", "--temperature=1",
                         f"--kv_cache={kv_cache}"])
            outs.append(capsys.readouterr())
        assert outs[0].out == outs[1].out and len(outs[0].out) > 60 and len(set(outs[0].out)) > 8, outs
        assert "kv_lora_rank 16" in outs[0].err and "rope_head_dim 8" in outs[0].err
        assert "n_kv_head" not in outs[0].err
        assert "KV cache 192 bytes per token" in outs[0].err


def test_a_changed_latent_is_no_resumption(run_dir, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main([f"--out_dir={run_dir}", "--init_from=resume", "--kv_lora_rank=8"])
    assert exit.value.code == 2 and "kv_lora_rank=8, but the model in" in capsys.readouterr().err
    for setting, before in (("attention=gqa", "mla"), ("n_head=8", 4), ("n_head=2", 4), ("nope_head_dim=2", 4)):
        with pytest.raises(SystemExit) as exit:
            train.main([f"--out_dir={run_dir}", "--init_from=resume", f"--{setting}"])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and f"{setting}, but the model in" in error and f"has {before}: leave {setting.split('=')[0]} out" in error


@pytest.mark.parametrize("args,names", [
    (["--attention=gqa,mla"], ["MHA", "GQA-2", "MQA", "MLA"]),
    (["--attention=mla,gqa", "--n_kv_head=4"], ["MLA", "MHA"]),
    (["--n_kv_head=1,4", "--attention=gqa,mla", "--kv_lora_rank=8"], ["MHA", "MQA", "MLA"]),
    (["--attention=gqa,mla", "--n_kv_head=2", "--kv_lora_rank=8,16"], ["GQA-2", "MLA kv_lora_rank=8", "MLA kv_lora_rank=16"]),
    (["--attention=gqa,mla", "--kv_lora_rank=8,16"], ["MHA", "GQA-2", "MQA", "MLA kv_lora_rank=8", "MLA kv_lora_rank=16"]),
    (["--attention=mla", "--kv_lora_rank=8,16"], ["kv_lora_rank=8", "kv_lora_rank=16"]),
    (["--n_kv_head=1,None"], ["MHA", "MQA"]),
    (["--attention=mla"], ["MLA"])], ids=str)
def test_a_comparison_has_it_as_a_row(toy_data, args, names):
    toy = [f"--dataset={toy_data}", "--device=cpu", "--n_layer=2", "--n_head=4", "--n_embd=64", "--block_size=32"]
    _, runtime, variants = compare.plan(parse(compare.CompareConfig, [*toy, *args], "", axes=True))
    assert [v.name for v in variants] == names * 2
    for v in variants:
        if v.match == "params":
            assert abs(v.facts["params"] / variants[0].facts["params"] - 1) < 0.005
        if v.name == "MLA":
            assert v.facts["kv_bytes_per_token"] == 2 * ((8 if "--kv_lora_rank=8" in args else 32) + 16) * 4
        assert build(TrainConfig, vars(v.config)) == v.config, "what a run is told is the variant"


# -- Hugging Face --------------------------------------------------------------------------------------------------------

def save(model, folder):
    folder.mkdir()
    convert.write_checkpoint(folder, dict(model=model.state_dict(), config=vars(model.config), tokenizer="none"))
    return folder


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=12, tie_embeddings=False, norm_eps=1e-3, rope_theta=500.0),
                                     dict(kv_lora_rank=9, rope_head_dim=10, nope_head_dim=6, v_head_dim=5),
                                     dict(rope_factor=4.0, rope_original_block_size=16, rope_head_dim=8)],
                         ids=["default", "query-latent", "odd-sizes", "llama3-rope"])
def test_export_has_the_logits_of_transformers(tmp_path, capsys, changes):
    transformers = pytest.importorskip("transformers")
    model, ids = mla_model(**changes), toy_ids(2, 48)
    convert.main(["to_hf", f"--out_dir={save(model, tmp_path / 'ours')}", f"--hf_dir={tmp_path / 'hf'}"])
    assert "DeepseekV3ForCausalLM" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM" and theirs.config.rope_interleave
    assert sum(p.numel() for p in theirs.parameters()) == num_params(model)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[0], atol=1e-3, rtol=1e-4)
        text = theirs.generate(ids[:1, :5], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:].tolist()
    assert text == [new for _, (new,) in generate(model, [ids[0, :5].tolist()], 20, temperature=0)]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        convert.main(["from_hf", f"--hf_dir={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'back'}"])
    assert "model_type 'deepseek_v3' cannot be imported: use a checkpoint of one of llama" in capsys.readouterr().err


@pytest.mark.parametrize("command,words", [
    (["to_hf", "--hf_dir=HF"], "attention=mla without qk_norm is not an architecture"),
    (["pool", "--new_dir=HF", "--n_kv_head=2"], "has attention=mla, whose heads share one latent already")], ids=["to_hf", "pool"])
def test_what_cannot_be_converted_is_named(tmp_path, capsys, command, words):
    folder = save(mla_model(qk_norm=False), tmp_path / "ours")
    with pytest.raises(SystemExit) as exit:
        convert.main([*(arg.replace("HF", str(tmp_path / "new")) for arg in command), f"--out_dir={folder}"])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and words in error and "\n" not in error and not (tmp_path / "new").exists()
