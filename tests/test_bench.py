"""bench.py: what it prints, and that what it times is the model."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import peak_allocated, toy_config, toy_ids, toy_model

import bench
import sample
import train
from model import GPT, KVCache
from sample import compile_for_decoding, decoding_bytes, generate, prefill, prepare_for_decoding
from train import pick_runtime

ROOT = Path(__file__).resolve().parents[1]

SHAPE = ["--device=cpu", "--n_layer=2", "--n_head=4", "--n_embd=32", "--vocab_size=65", "--new_tokens=6", "--repeats=2"]


def result(capsys, *args):
    capsys.readouterr()
    bench.main([*SHAPE, *args])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_decode_reports_what_was_read(capsys):
    row = result(capsys, "--mode=decode", "--n_kv_head=2", "--batch_size=3", "--prompt_len=10", "--dtype=float32")
    assert row["kv_cache_bytes"] == 3 * 16 * 2 * 2 * 2 * 8 * 4
    weights = 65 * 32 + 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 96 + 2 * 32 + 2 * 8) + 32
    assert row["bytes_per_step"] == 4 * weights + 3 * 13 * 2 * 2 * 2 * 8 * 4
    assert row["decode_tok_s"] == pytest.approx(3 / row["step_ms"] * 1e3, rel=1e-3)
    assert row["bandwidth_gb_s"] == pytest.approx(row["bytes_per_step"] / row["step_ms"] / 1e6, rel=1e-2, abs=1e-4)
    assert 0 < row["mbu"] < 1 and row["prefill_s"] > 0 and row["warmup_s"] > 0
    assert (row["n_kv_head"], row["batch_size"], row["prompt_len"]) == (2, 3, 10)


def test_a_cache_can_be_filled_without_a_prompt(capsys):
    assert result(capsys, "--prefill=False", "--prompt_len=50")["prefill_s"] is None


def test_lists_make_a_table(capsys):
    rows = result(capsys, "--n_kv_head=4,2,1", "--batch_size=1,2", "--prompt_len=4")["rows"]
    assert [(row["n_kv_head"], row["batch_size"]) for row in rows] == [(4, 1), (4, 2), (2, 1), (2, 2), (1, 1), (1, 2)]
    assert rows[0]["kv_cache_bytes"] == 4 * rows[4]["kv_cache_bytes"]


def test_train_reports_a_whole_step(capsys):
    row = result(capsys, "--mode=train", "--batch_size=4", "--block_size=16", "--steps=5")
    assert row["tok_s"] == pytest.approx(64 / row["step_ms"] * 1e3, rel=1e-3)
    assert row["mfu"] is None and row["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_prepared_weights_give_the_same_logits_and_free_the_plain_ones(n_kv_head, tied):
    model, ids = toy_model(n_kv_head=n_kv_head, tie_embeddings=tied, qkv_bias=True), toy_ids(2, 20)
    expected = model(ids)[0].detach()
    prepared = prepare_for_decoding(model, 2)
    with torch.inference_mode():
        cache = KVCache(prepared.config, 2, 20)
        out = torch.cat([prepared(part, cache=cache)[0] for part in ids.split([13, 1, 1, 5], dim=1)], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    if sample.ONEDNN:
        left = {name for name, p in prepared.named_parameters() if p.dim() == 2 and not p.is_mkldnn}
        assert left == {"embed.weight"}


def test_a_prompt_read_in_chunks_gives_the_same_text(monkeypatch, n_kv_head):
    model, ids = toy_model(n_kv_head=n_kv_head, tie_embeddings=False), toy_ids(1, 30)
    texts = []
    for chunk in (512, 7, 1):
        monkeypatch.setattr(sample, "prefill_chunk", lambda config, batch_size: chunk)
        texts.append([new for _, (new,) in generate(model, [ids[0].tolist()], 12, temperature=0)])
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 3
    calls, cache = [], KVCache(model.config, 1, 48)
    with torch.inference_mode():
        logits = prefill(lambda idx, **kwargs: calls.append(idx.size(1)) or model(idx, **kwargs), ids, cache, 7)
        torch.testing.assert_close(logits, model(ids, logits="last")[0], atol=1e-4, rtol=1e-4)
    assert calls == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("shape", [
    dict(n_kv_head=8), dict(n_kv_head=8, n_ff=192), dict(n_kv_head=8, qk_norm=False), dict(n_kv_head=2), dict(n_kv_head=1),
    dict(n_kv_head=1, n_ff=192, qk_norm=False), dict(attention="mla"), dict(attention="mla", q_lora_rank=24)], ids=str)
@pytest.mark.parametrize("batch,length,static,padded", [
    (1, 64, False, False), (16, 256, False, False), (3, 700, False, False), (1, 2000, False, False), (1, 64, True, False),
    (2, 256, True, True), (2, 256, False, True)])
def test_prefill_takes_no_more_than_the_formula_says(shape, batch, length, static, padded):
    """Of torch's allocator; the resident size of a process is asserted below."""
    places = 2 * length if static else length
    config = toy_config(**{**dict(block_size=places, n_head=8, n_embd=64, n_ff=96, vocab_size=300), **shape})
    model, idx = prepare_for_decoding(GPT(config).eval(), batch), toy_ids(batch, length)
    bound = decoding_bytes(config, batch, length, places, pick_runtime("cpu", "float32", False), static, padded)
    cache = KVCache(config, batch, places, static=static, padding=torch.arange(batch) if padded else None)
    assert cache.nbytes == bound["cache"]
    peak = peak_allocated(lambda: prefill(model, idx, cache, sample.prefill_chunk(config, batch)))
    assert 0.3 * bound["prefill"] < peak < bound["prefill"] + bound["logits"]


def test_decoding_holds_the_weights_once(tmp_path):
    """Resident memory of a whole process: the plain weights beside the packed ones would be 190 MiB beyond the bound."""
    args = ["--n_layer=8", "--n_head=8", "--n_kv_head=2", "--n_embd=768", "--vocab_size=8000", "--batch_size=4", "--prompt_len=300",
            "--new_tokens=4", "--repeats=1", "--device=cpu", "--dtype=float32"]
    out = subprocess.run([sys.executable, ROOT / "bench.py", *args], capture_output=True, text=True, check=True).stdout
    row = json.loads(out.splitlines()[-1])
    assert row["memory_bound_bytes"] > 250 * 2**20
    if sys.platform == "linux":
        assert row["peak_memory_bytes"] < 1.15 * row["memory_bound_bytes"] + 40 * 2**20  # the libraries' own, at first use


@pytest.fixture
def graphs(monkeypatch):
    """A list that grows by one with every graph that torch.compile makes; they run without being optimised further."""
    torch.compiler.reset()
    made, compile = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda model, mode=None, **options: compile(model, backend=backend, **options))
    return made


@pytest.mark.parametrize("prompts", [1, 3], ids=["one", "ragged"])
def test_compiled_decoding_is_one_graph_for_prompts_and_one_for_tokens(graphs, n_kv_head, prompts):
    model = toy_model(n_kv_head=n_kv_head, block_size=128, tie_embeddings=False)
    prompts = [toy_ids(1, n, seed=n)[0].tolist() for n in (20, 5, 33)[:prompts]]
    compiled = compile_for_decoding(model, pick_runtime("cpu", "float32", True))
    plain, counts = list(generate(model, prompts, 66, temperature=0)), []
    for step, (rows, ids) in enumerate(generate(model, prompts, 66, temperature=0, compiled=compiled)):
        counts.append(len(graphs))
        assert (rows, ids) == plain[step]
    assert counts == [1] + [2] * 65
    list(generate(model, [prompt + [7, 8] for prompt in prompts], 64, temperature=0, compiled=compiled))
    assert len(graphs) == 2, "another length of the prompt is no new graph"


def test_compiled_decoding_past_the_context_and_with_rows_that_end(graphs):
    model = toy_model(n_kv_head=2, block_size=12, tie_embeddings=False)
    prompts, ends = [toy_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 1, 9)], [40, 4, 40, 9]
    texts = []
    for compiled in (None, compile_for_decoding(model, pick_runtime("cpu", "float32", True))):
        got = [[] for _ in prompts]
        for rows, ids in generate(model, prompts, 40, stopped=lambda row: len(got[row]) == ends[row], compiled=compiled, temperature=0):
            for row, token in zip(rows, ids):
                got[row].append(token)
        texts.append(got)
    assert texts[0] == texts[1] and [len(text) for text in texts[1]] == ends
    assert len(graphs) <= 8


def test_a_static_cache_refuses_what_does_not_fit():
    model = toy_model(n_kv_head=2)
    cache = KVCache(model.config, 1, 5, static=True)
    with torch.inference_mode():
        model(toy_ids(1, 5), cache=cache)
        with pytest.raises((RuntimeError, IndexError)):
            model(toy_ids(1, 1), cache=cache)


def test_a_missing_compiler_is_one_warning(monkeypatch, capsys):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")
    compile = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda model, mode=None, **options: compile(model, backend=backend, **options))
    model, runtime = toy_model(n_kv_head=2), pick_runtime("cpu", "float32", True)
    compiled = compile_for_decoding(model, runtime)
    out = list(generate(model, [[1, 2, 3]], 8, temperature=0, compiled=compiled))
    assert out == list(generate(model, [[1, 2, 3]], 8, temperature=0)) and not runtime.compile
    err = capsys.readouterr().err
    assert err.count("warning: torch.compile does not work here") == err.count("going on in eager mode") == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_the_real_compiler_gives_the_numbers_of_eager_mode(capsys):
    """With oneDNN's products, which torch.compile does not take by themselves: training, then decoding with packed weights."""
    torch.compiler.reset()
    runtime, model, ids = pick_runtime("cpu", "float32", True), toy_model(n_layer=1, n_kv_head=2), toy_ids(3, 16)
    gradients = []
    for forward in (model, train.compile_model(model, runtime, lambda forward: forward(ids, ids, logits="none"))):
        model.zero_grad()
        forward(ids, ids, logits="none")[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-3)
    prompts = [[1, 2, 3], [4, 5, 6]]
    plain = list(generate(model, prompts, 20, temperature=0))
    model = prepare_for_decoding(model, 2)
    assert list(generate(model, prompts, 20, temperature=0, compiled=compile_for_decoding(model, runtime))) == plain
    assert runtime.compile and "warning" not in capsys.readouterr().err


def test_compile_auto_looks_at_the_number_of_tokens():
    assert not pick_runtime("cpu", "float32", "auto", 300).compile and pick_runtime("cpu", "float32", "auto", 10**6).compile


def test_decode_times_a_checkpoint(capsys, toy_run, tmp_path):
    train.main([*toy_run, "--max_steps=1"])
    bench.main([f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--prompt_len=50", "--new_tokens=4", "--dtype=float32"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["n_layer"], row["n_head"], row["n_kv_head"], row["kv_cache_bytes"]) == (2, 4, 2, 54 * 2 * 2 * 2 * 8 * 4)
    with pytest.raises(SystemExit) as exit:
        bench.main(["--out_dir=/no"])
    assert exit.value.code == 2 and "there is no checkpoint /no/ckpt.pt" in capsys.readouterr().err


@pytest.mark.parametrize("args,words", [
    (["--mode=fly"], "mode must be decode or train"), (["--n_kv_head=3"], "does not divide"), (["--batch_size=0"], "batch_size must be"),
    (["--batch_size=1,x"], "batch_size must be a whole number"), (["--out_dir=/no"], "and out_dir exclude each other"),
    (["--mode=train", "--out_dir=x"], "out_dir is for --mode=decode"),
    (["--mode=scale"], "and no other setting: leave the rest out"), (["--mode=train,scale"], "and no other setting")])
def test_bad_settings_of_bench(capsys, args, words):
    with pytest.raises(SystemExit) as exit:
        bench.main([*SHAPE, *args])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and words in error and "\n" not in error


def test_scale_formulas_by_hand():
    config, model = bench.size_of("gpt2_124m")
    P, tables = 123_588_864, 50304 * 768
    assert model.num_params() == P and model.embed.weight.is_meta
    assert bench.state_bytes(model, 1, True) == bench.state_bytes(model, 64, False) == P * 16 + P * 2 == 2_224_599_552
    assert bench.state_bytes(model, 8, True) == P * 2 + 6 * (tables + (P - tables) / 6)
    assert bench.sent_bytes(P, 1, False) == bench.sent_bytes(P, 1, True) == 0
    assert bench.sent_bytes(P, 2, False) == 4 * P  # 2 (n - 1) / n = 1
    assert bench.sent_bytes(1000, 8, False) == 7000 and bench.sent_bytes(1000, 8, True, micro_steps=3) == 21000
    row = bench.scale(config, model, 64, False)  # 8 of 512 sequences each
    assert row["tokens"] == 2**19 and row["compute_s"] == pytest.approx(8192 * 854_654_976 / (0.4 * 989e12), rel=1e-9)
    assert row["communication_s"] == pytest.approx(2 * 63 / 64 * 4 * P / 400e9)
    assert bench.scale(config, model, 8, False)["communication_s"] == pytest.approx(7 * P / 450e9)
    assert bench.scale(config, model, 8, True)["sent"] == 4 * 7 * P  # 64 sequences each, 4 micro-steps of 16
    assert bench.scale(config, model, 1024, False)["tokens"] == 2**20  # one sequence each
    row = dict(tokens=1200, memory=100.0, recomputing=50.0, compute_s=3.0, communication_s=2.0)
    assert bench.speed(row, 112) == "240 to 400" and bench.speed(row, 60) == "200 to 300, recomputing"
    assert bench.speed(row, 55) == "does not fit" and bench.speed(dict(row, communication_s=0.0), 112) == "400"


def test_scale_falls_and_grows_as_it_must():
    for name in bench.SIZES:
        size = bench.size_of(name)
        fsdp, ddp = ([bench.scale(*size, gpus, sharded) for gpus in (2, 8, 64, 1024)] for sharded in (True, False))
        for rows in (fsdp, ddp):
            assert all(row["recomputing"] < row["memory"] for row in rows)
            assert [row["compute_s"] for row in rows] == sorted((row["compute_s"] for row in rows), reverse=True)
        states = [bench.state_bytes(size[1], gpus, True) for gpus in (2, 8, 64, 1024)]
        assert all(a > b for a, b in zip(states, states[1:])) and states[0] < bench.state_bytes(size[1], 2, False)
        assert all(a["memory"] > b["memory"] for a, b in zip(fsdp, fsdp[1:]))
        assert all(a["sent"] < b["sent"] for a, b in zip(ddp, ddp[1:]))  # towards 8 bytes a parameter


@pytest.mark.parametrize("qk_norm", [True, False])
def test_activations_of_a_block_are_what_autograd_keeps(n_kv_head, qk_norm):
    """In bfloat16 on a CPU, whose RMSNorm is no fused one: it keeps two float32 copies of its input and a root mean square."""
    def kept(n_layer):
        model, ids, seen = toy_model(n_layer=n_layer, n_kv_head=n_kv_head, qk_norm=qk_norm, head_dim=16), toy_ids(2, 48), {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model(ids, ids, logits="none")
        for p in model.parameters():
            seen.pop(p.untyped_storage().data_ptr(), None)
        return model, sum(x.untyped_storage().nbytes() for x in seen.values())
    (one, bytes_of_one), (two, bytes_of_two) = kept(1), kept(2)
    c = two.config
    heads, copies = c.n_head + c.n_kv_head, 2 * (two.num_params() - one.num_params() - 2 * c.n_embd)  # weights in bfloat16
    composite = 2 * (4 * c.n_embd + 4) + (4 * heads * 16 + 4 * heads if qk_norm else 0)
    formula = bench.activation_bytes(c, 96) - bench.activation_bytes(one.config, 96)
    assert bytes_of_two - bytes_of_one - copies == formula + 96 * composite
    recomputing = bench.activation_bytes(c, 96, True) - bench.activation_bytes(one.config, 96, True)
    assert recomputing == 96 * 4 * c.n_embd  # the input of one more block


def test_the_document_of_scale_is_the_committed_one(capsys):
    capsys.readouterr()
    bench.main(["--mode=scale"])
    text = capsys.readouterr().out
    assert text.encode() == (ROOT / "docs/scale.md").read_bytes(), "run python bench.py --mode=scale > docs/scale.md"
    assert "does not fit" in text and "not measured on a GPU (no GPU was at hand)" in text
    for name, _, _, tokens, hours, ddp, _, fsdp, recomputing in re.findall(r"^\| \[(.+?)\].*?" + r" \| ([\d.,]+)" * 8, text, re.M):
        words = [f"{tokens} billion tokens", f"{hours} GPU-hours", f"{ddp} GB"]
        words += [f"{fsdp} GB", f"{recomputing} GB"] if name == "llama_8b" else []
        said = " ".join((ROOT / f"config/{name}.py").read_text().split())
        assert name == "gpt2_124m" or all(word in said for word in [*words, "not measured"]), name
    assert re.findall(r"^\| \[(.+?)\]", text, re.M) == list(bench.SIZES)
