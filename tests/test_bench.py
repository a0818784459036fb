"""bench.py: what it prints, and that what it times is the model."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import kept_in_memory, peak_allocated, toy_config, toy_ids, toy_model
from test_inputs import fails
from torch import nn

import bench
import sample
import train
from model import GPT
from nanogqa.cache import KVCache
from nanogqa import costs, fast, saver
from nanogqa.configurator import UserError
from nanogqa.costs import Decoding, decoding_bytes
from nanogqa.fast import FastLinear, accelerate, prepare_for_decoding
from nanogqa.runtime import compile_for_decoding, compile_model, pick_runtime
from sample import generate, prefill

ROOT = Path(__file__).resolve().parents[1]

SHAPE = ["--device=cpu", "--n_layer=2", "--n_head=4", "--n_embd=32", "--vocab_size=65"]
SHORT_DECODING = ["--new_tokens=6", "--repeats=2"]


MEASURED_BANDWIDTH = bench.bandwidth


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """The bandwidth of this machine: half a gigabyte and a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "bandwidth", kept_in_memory(bench.bandwidth))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Products of these sizes are no faster with two threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def result(capsys, *args):
    capsys.readouterr()
    if "--mode=train" not in args:
        args = [*SHORT_DECODING, *args]
    bench.main([*SHAPE, *args])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# -- the rows of results ---------------------------------------------------------------------------

def test_decode_reports_what_was_read(capsys):
    row = result(capsys, "--mode=decode", "--n_kv_head=2", "--batch_size=3", "--prompt_len=10",
                 "--dtype=float32")
    assert row["kv_cache_bytes"] == 3 * 16 * 2 * 2 * 2 * 8 * 4
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8
    weights = 65 * 32 + 2 * (attention + 3 * 32 * 96 + 2 * 32) + 32
    assert row["bytes_per_step"] == 4 * weights + 3 * 13 * 2 * 2 * 2 * 8 * 4
    assert row["decode_tok_s"] == pytest.approx(3 / row["step_ms"] * 1e3, rel=1e-3)
    rate = row["bytes_per_step"] / row["step_ms"] / 1e6
    assert row["bandwidth_gb_s"] == pytest.approx(rate, rel=1e-2, abs=1e-4)
    peak = bench.bandwidth(pick_runtime("cpu", "float32", False))
    expected = row["bytes_per_step"] / (row["step_ms"] / 1e3) / peak
    assert row["mbu"] == pytest.approx(expected, rel=1e-2, abs=1e-5) and 0 < row["mbu"] < 1
    assert row["prefill_s"] > 0
    assert row["warmup_s"] > 0
    assert (row["n_kv_head"], row["batch_size"], row["prompt_len"]) == (2, 3, 10)


def test_an_embedding_table_beside_a_head_is_not_read():
    """Each row looks up one of its lines; a tied table is read as the head."""
    sizes = {}
    for tied in (True, False):
        model = toy_model(tie_embeddings=tied)
        sizes[tied] = costs.bytes_per_step(model, 2, 10, torch.float32)
        assert costs.num_params(model) == costs.num_params(toy_model()) + (not tied) * 65 * 32
    assert sizes[True] == sizes[False]


def test_utilisation_of_all_ranks(monkeypatch):
    """Tokens per second of 4 ranks on H100s, whose data sheet has 989.4 TFLOP/s in bfloat16 without sparsity."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    runtime = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, ranks=4)
    model = toy_model()
    wanted = 1e9 * costs.flops_per_token(model) / (4 * 989.4e12)
    assert costs.mfu(1e9, model, runtime) == pytest.approx(wanted, rel=1e-3)
    assert costs.mfu(None, model, runtime) is None
    runtime.dtype = torch.float32
    assert costs.mfu(1e9, model, runtime) is None


def test_the_keys_of_a_row(capsys):
    """Other programs read them, and tables of results hold them."""
    shape = ["mode", "n_layer", "n_head", "n_embd", "attention", "n_kv_head", "kv_lora_rank",
             "q_lora_rank", "rope_head_dim", "nope_head_dim", "v_head_dim", "batch_size"]
    place = ["device", "dtype", "compile", "torch"]
    decoding = ["prompt_len", "new_tokens", "warmup_s", "prefill_s", "step_ms", "decode_tok_s",
                "kv_cache_bytes", "bytes_per_step", "bandwidth_gb_s", "mbu", "peak_memory_bytes",
                "memory_bound_bytes"]
    training = ["block_size", "micro_steps", "warmup_s", "step_ms", "tok_s", "mfu", "peak_memory_bytes"]
    assert list(result(capsys)) == shape + decoding + place
    row = result(capsys, "--mode=train", "--block_size=16", "--steps=1")
    assert list(row) == shape + training + place


def test_a_cache_can_be_filled_without_a_prompt(capsys):
    assert result(capsys, "--prefill=False", "--prompt_len=50")["prefill_s"] is None


def test_lists_make_a_table(capsys):
    rows = result(capsys, "--n_kv_head=4,2,1", "--batch_size=1,2", "--prompt_len=4")["rows"]
    shapes = [(row["n_kv_head"], row["batch_size"]) for row in rows]
    assert shapes == [(4, 1), (4, 2), (2, 1), (2, 2), (1, 1), (1, 2)]
    assert rows[0]["kv_cache_bytes"] == 4 * rows[4]["kv_cache_bytes"]


def test_train_reports_a_whole_step(capsys):
    row = result(capsys, "--mode=train", "--batch_size=4", "--block_size=16", "--steps=5")
    assert row["tok_s"] == pytest.approx(64 / row["step_ms"] * 1e3, rel=1e-3)
    assert row["mfu"] is None
    assert row["peak_memory_bytes"] > 2**20


def test_the_timed_step_is_that_of_train(monkeypatch, capsys):
    """Each step computes a gradient of batch_size x block_size targets and applies it once."""
    seen, backward, update = [], bench.backward, bench.update

    def watched_backward(forward, batches, runtime):
        seen.append([batch.y.shape for batch in batches])
        return backward(forward, batches, runtime)

    def watched_update(model, optimizers, grad_clip):
        before = model.embed.weight.detach().clone()
        norm = update(model, optimizers, grad_clip)
        seen.append((grad_clip, norm > 0, not torch.equal(before, model.embed.weight)))
        return norm

    monkeypatch.setattr(bench, "backward", watched_backward)
    monkeypatch.setattr(bench, "update", watched_update)
    result(capsys, "--mode=train", "--batch_size=4", "--block_size=16", "--steps=3")
    assert seen == [[(4, 16)], (1.0, True, True)] * (bench.WARMUP_STEPS + 3)


def test_a_step_updates_once_after_all_micro_steps(monkeypatch, capsys):
    """compare.py's runs do. Each forward pass was timed with an update of its own."""
    calls, forward, update = [], bench.GPT.forward, bench.update
    monkeypatch.setattr(bench.GPT, "forward", lambda self, x, *rest, **kwargs: (calls.append(x.shape), forward(self, x, *rest, **kwargs))[1])
    monkeypatch.setattr(bench, "update", lambda *args: (calls.append("update"), update(*args)))
    row = result(capsys, "--mode=train", "--batch_size=2", "--block_size=16", "--micro_steps=3", "--steps=2", "--compile=False")
    assert calls == [*[(2, 16)] * 3, "update"] * (bench.WARMUP_STEPS + 2)
    assert row["tok_s"] == pytest.approx(3 * 2 * 16 / row["step_ms"] * 1e3, rel=1e-3)


@pytest.mark.parametrize("mode", ["decode", "train"])
def test_fast_false_times_the_plain_modules(monkeypatch, capsys, mode):
    kinds = []
    name = {"decode": "time_run", "train": "make_optimizers"}[mode]
    function = getattr(bench, name)

    def watched(model, *rest):
        kinds.append({type(module) for module in model.modules()})
        return function(model, *rest)
    monkeypatch.setattr(bench, name, watched)
    short = {"decode": ["--repeats=1"], "train": ["--block_size=16", "--steps=1"]}[mode]
    rows = result(capsys, f"--mode={mode}", *short, "--dtype=float32", "--fast=True,False")["rows"]
    assert nn.Linear not in kinds[0]
    assert nn.RMSNorm not in kinds[0]
    assert nn.Linear in kinds[-1]
    assert nn.RMSNorm in kinds[-1]
    if mode == "decode" and fast.ONEDNN:  # a tied table is not held in a second layout
        difference = rows[0]["memory_bound_bytes"] - rows[1]["memory_bound_bytes"]
        assert difference == 65 * 32 * 4


def test_decode_times_a_checkpoint(capsys, toy_run, tmp_path):
    train.main([*toy_run, "--max_steps=1"])
    bench.main([f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--prompt_len=50",
                "--new_tokens=4", "--dtype=float32"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["n_layer"], row["n_head"], row["n_kv_head"]) == (2, 4, 2)
    assert row["kv_cache_bytes"] == 54 * 2 * 2 * 2 * 8 * 4
    with pytest.raises(SystemExit) as exit:
        bench.main(["--out_dir=/no"])
    assert exit.value.code == 2
    assert "there is no checkpoint /no/ckpt.pt" in capsys.readouterr().err


@pytest.mark.parametrize("args,words", [
    (["--mode=fly"], "mode must be decode or train"),
    (["--n_kv_head=3"], "does not divide"),
    (["--batch_size=0"], "batch_size must be"),
    (["--batch_size=1,x"], "batch_size must be a whole number"),
    (["--seed=-1"], "seed must be at least 0"),
    (["--out_dir=/no"], "and out_dir exclude each other"),
    (["--mode=train", "--prefill=False"], "--mode=train does not read prefill: leave out what is for --mode=decode, or time that"),
    (["--steps=3", "--optimizer=muon"], "--mode=decode does not read steps, optimizer: leave out what is for --mode=train"),
    (["--mode=train,decode", "--recompute=True"], "--mode=decode does not read recompute"),
    (["--block_size=64"], "--mode=decode does not read block_size"),
    (["--mode=scale"], "and no other setting: leave the rest out"),
    (["--mode=train,scale"], "and no other setting"),
    (["--mode=train", "--trainable=("], "is not a regular expression"),
])
def test_bad_settings_of_bench(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        bench.main([*SHAPE, *args])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert words in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_help_names_what_bench_does_with_vocab_size(capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert re.search(r"--vocab_size=None +rows of the embedding table; None: 257, of the byte tokenizer\n", text)
    assert text.count("--vocab_size=") == 1
    assert text.index("what to time:") < text.index("where it runs:") < text.index("\nmodel:")


@pytest.mark.parametrize("modes", ["decode", "decode,train", "train,decode"])
def test_the_length_of_decoding_is_not_block_size(capsys, modes):
    """A list was accepted if train came first: the same decoding was timed for each."""
    error = fails(bench.main, [*SHAPE, f"--mode={modes}", "--block_size=64,128"], capsys)
    assert "--mode=decode does not read block_size: leave out what is for --mode=train" in error


def test_training_on_a_gpu_needs_the_memory_of_the_gpu(monkeypatch):
    """The machine's memory has to hold the weights; gradients and moments were counted too."""
    asked = []

    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped
    monkeypatch.setattr(bench, "check_memory", lambda floor: asked.append(sum(floor.values())))
    monkeypatch.setattr(bench, "make_model", stop)
    config = bench.BenchConfig(mode="train", vocab_size=65)
    for device in ("cpu", "mps"):
        with pytest.raises(Stopped):
            bench.train(config, SimpleNamespace(device=torch.device(device)))
    weights = 4 * costs.num_params(GPT(config))
    assert asked[0] > 4 * weights > asked[1] > weights


# -- how it times ----------------------------------------------------------------------------------

def test_every_run_starts_from_the_context_and_the_fastest_counts(capsys, monkeypatch):
    """The first one is the warm-up, with at most 4 tokens."""
    runs, seconds = [], iter([0.9, 0.5, 0.2, 0.4])

    def time_run(forward, token, cache, steps, runtime):
        runs.append((int(cache.length), steps))
        cache.set_length(cache.length + steps)
        return next(seconds)
    monkeypatch.setattr(bench, "time_run", time_run)
    row = result(capsys, "--mode=decode", "--prompt_len=10", "--repeats=3")
    assert runs == [(10, 4), (10, 6), (10, 6), (10, 6)] and row["step_ms"] == 200


def test_a_run_is_timed_by_its_median_step(monkeypatch):
    times = iter([0, 1, 1, 2, 2, 12])  # steps of 1, 1 and 10 seconds
    monkeypatch.setattr(bench, "clock", lambda runtime: next(times))
    model = toy_model()
    cache = KVCache(model.config, 1, 8)
    assert bench.time_run(model, toy_ids(1, 1), cache, 3, None) == 1 and cache.length == 3


def test_bandwidth_counts_both_tensors(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    runtime = SimpleNamespace(device=torch.device("cpu"))
    assert MEASURED_BANDWIDTH(runtime) == 2 * 4 * 2**26, "two tensors of 2^26 float32 numbers in a second"


# -- what decoding holds ---------------------------------------------------------------------------

def test_masks_are_as_large_as_where_they_are_made():
    """Attention repeats a mask for the queries that share a head: in steps, and in prompts on a GPU."""
    config, number = toy_config(n_kv_head=1), 4
    prompt = dict(batch_size=1, prompt_len=2000, max_length=2000, padded=True)
    one_head = 1024 * 2000 * (2 + 2 + number)
    assert costs.mask_bytes(config, Decoding(**prompt), 1, 1024) == one_head
    four_heads = 1024 * 2000 * (2 + 4 * (2 + number))
    assert costs.mask_bytes(config, Decoding(**prompt, folded=True), 1, 1024) == four_heads
    step = Decoding(3, 1, 500, static=True, padded=True)
    assert costs.mask_bytes(config, step, 3, 1) == 3 * 500 * (2 + 4 * (2 + number))
    for device in ("cpu", "cuda"):
        runtime = SimpleNamespace(device=torch.device(device), dtype=torch.float32, compile=False)
        assert bench.decoding_of(bench.BenchConfig(), runtime).folded == (device == "cuda")


def test_a_prompt_read_in_chunks_gives_the_same_text(monkeypatch, n_kv_head):
    model, ids = toy_model(n_kv_head=n_kv_head, tie_embeddings=False), toy_ids(1, 30)
    texts = []
    for chunk in (512, 7, 1):
        monkeypatch.setattr(sample, "prefill_chunk", lambda *args, n=chunk: (1, n))
        tokens = generate(model, [ids[0].tolist()], 12, temperature=0)
        texts.append([new for _, (new,) in tokens])
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 3
    calls, cache = [], KVCache(model.config, 1, 48)

    def watched(idx, **kwargs):
        calls.append(idx.size(1))
        return model(idx, **kwargs)
    with torch.inference_mode():
        monkeypatch.setattr(sample, "prefill_chunk", lambda *args: (1, 7))
        logits = prefill(watched, ids, cache)
        torch.testing.assert_close(logits, model(ids, logits="last")[0], atol=1e-4, rtol=1e-4)
    assert calls == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("parts", [(1, 33), (2, 33), (3, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_prompts_read_a_few_rows_at_a_time_give_the_same_text(monkeypatch, attention, parts):
    """Rows of different length, and a cache that is read again when the context is full."""
    model = toy_model(attention=attention, block_size=40, tie_embeddings=False)
    prompts = [toy_ids(1, n, seed=n)[0].tolist() for n in (20, 33, 5, 33, 1)]
    texts = []
    for chunk in ((5, 40), parts):
        monkeypatch.setattr(sample, "prefill_chunk", lambda *args, chunk=chunk: chunk)
        texts.append([ids for _, ids in generate(model, prompts, 30, temperature=0)])
    assert texts[0] == texts[1]


def test_parts_of_a_prompt():
    """A prompt without a mask is read at once, a few rows in each pass; one with a mask in chunks."""
    assert costs.prefill_chunk(1, 4096, masked=False, static=False) == (1, 4096)
    assert costs.prefill_chunk(16, 4096, masked=False, static=False) == (1, 4096)
    assert costs.prefill_chunk(8, 1024, masked=False, static=False) == (2, 1024)
    assert costs.prefill_chunk(8, 64, masked=False, static=False) == (8, 64)
    assert costs.prefill_chunk(1, 5000, masked=False, static=False) == (1, 1024)
    assert costs.prefill_chunk(3, 4000, masked=True, static=False) == (2, 1024)
    assert costs.prefill_chunk(16, 4096, masked=True, static=True) == (16, 128)


@pytest.mark.parametrize("shape", [
    dict(n_kv_head=8), dict(n_kv_head=8, n_ff=192), dict(n_kv_head=8, qk_norm=False),
    dict(n_kv_head=2), dict(n_kv_head=1), dict(n_kv_head=1, n_ff=192, qk_norm=False),
    dict(attention="mla"), dict(attention="mla", q_lora_rank=24),
    dict(n_kv_head=8, window=40, qk_norm=False, n_ff=8), dict(n_kv_head=1, window=500, global_every=2),
    dict(attention="mla", window=100), dict(n_kv_head=8, n_layer=24, kv_share=2, window=500, n_ff=8)], ids=str)
@pytest.mark.parametrize("batch,length,static,padded", [
    (1, 64, False, False), (16, 256, False, False), (3, 700, False, False),
    (1, 2000, False, False), (1, 64, True, False), (2, 256, True, True), (2, 256, False, True)])
@pytest.mark.parametrize("fast_modules", [True, False], ids=["fast", "plain"])
def test_prefill_takes_no_more_than_the_formula_says(
        shape, batch, length, static, padded, fast_modules):
    """Counted by torch's allocator. The resident size of a process is asserted below."""
    torch.set_num_threads(2)  # attention has buffers for each thread
    places = 2 * length if static else length
    sizes = dict(block_size=places, n_head=8, n_embd=64, n_ff=96, vocab_size=300)
    config = toy_config(**{**sizes, **shape})
    model, idx = GPT(config).eval(), toy_ids(batch, length)
    packed = fast_modules and fast.ONEDNN
    bound = decoding_bytes(model, Decoding(
        batch, length, places, packed=packed, static=static, padded=padded))
    if fast_modules:
        prepare_for_decoding(model, batch)
    cache = KVCache(config, batch, places, static=static)
    if padded:
        cache.padding = torch.arange(batch)
    assert cache.nbytes == bound["cache"]
    peak = peak_allocated(lambda: prefill(model, idx, cache))
    assert 0.3 * bound["prefill"] < peak < bound["prefill"] + bound["logits"]


def test_decoding_holds_the_weights_once(tmp_path):
    """Resident memory of a whole process: the plain weights beside the packed ones would be 190 MiB
    more than the bound."""
    args = ["--n_layer=8", "--n_head=8", "--n_kv_head=2", "--n_embd=768", "--vocab_size=8000",
            "--batch_size=4", "--prompt_len=300", "--new_tokens=4", "--repeats=1", "--device=cpu",
            "--dtype=float32"]
    out = subprocess.run([sys.executable, ROOT / "bench.py", *args], capture_output=True, text=True,
                         check=True, timeout=250).stdout
    row = json.loads(out.splitlines()[-1])
    assert row["memory_bound_bytes"] > 250 * 2**20
    if sys.platform == "linux":
        assert row["peak_memory_bytes"] < row["memory_bound_bytes"]


# -- torch.compile ---------------------------------------------------------------------------------

@pytest.mark.parametrize("prompts", [1, 3], ids=["one", "ragged"])
def test_compiled_decoding_is_one_graph_for_prompts_and_one_for_tokens(graphs, n_kv_head, prompts):
    model = toy_model(n_kv_head=n_kv_head, block_size=128, tie_embeddings=False)
    prompts = [toy_ids(1, n, seed=n)[0].tolist() for n in (20, 5, 33)[:prompts]]
    compiled = compile_for_decoding(model, pick_runtime("cpu", "float32", True))
    plain, counts = list(generate(model, prompts, 66, temperature=0)), []
    tokens = generate(model, prompts, 66, temperature=0, compiled=compiled)
    for step, (rows, ids) in enumerate(tokens):
        counts.append(len(graphs))
        assert (rows, ids) == plain[step]
    assert counts == [1] + [2] * 65
    longer = [prompt + [7, 8] for prompt in prompts]
    list(generate(model, longer, 64, temperature=0, compiled=compiled))
    assert len(graphs) == 2, "a prompt of another length needs no new graph"


def test_compiled_decoding_past_the_context_and_with_rows_that_end(graphs):
    model = toy_model(n_kv_head=2, block_size=12, tie_embeddings=False)
    prompts = [toy_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 1, 9)]
    ends = [40, 4, 40, 9]
    texts, sizes = [], []  # sizes: rows of each compiled step
    whole = compile_for_decoding(model, pick_runtime("cpu", "float32", True))

    def watched(idx, **kwargs):
        if idx.size(1) == 1:
            sizes.append(len(idx))
        return whole(idx, **kwargs)
    for compiled in (None, watched):
        got = [[] for _ in prompts]

        def stopped(row, got=got):
            return len(got[row]) == ends[row]
        tokens = generate(model, prompts, 40, stopped=stopped, compiled=compiled, temperature=0)
        for rows, ids in tokens:
            for row, token in zip(rows, ids, strict=True):
                got[row].append(token)
        texts.append(got)
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[1]] == ends
    assert set(sizes) == {4, 2} and sizes == sorted(sizes, reverse=True), "it shrinks by halves"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_compiled_step_is_one_graph_without_a_prompt_too(graphs, batch_size, capsys):
    """The first token was a slice of the prompts, whose strides no other token has: a second graph."""
    bench.main(["--mode=decode", "--compile=True", "--prefill=False", f"--batch_size={batch_size}", "--n_layer=1",
                "--n_embd=32", "--new_tokens=4", "--repeats=1", "--device=cpu"])
    assert len(graphs) == 1


def test_every_model_of_a_sweep_is_compiled(graphs):
    """Dynamo limits how often it compiles a function, over all models of a process."""
    runtime, ids = pick_runtime("cpu", "float32", True), toy_ids(1, 8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for count, width in enumerate((32, 64), start=1):
            model = toy_model(n_layer=1, n_embd=width)
            compile_model(model, runtime, lambda forward: forward(ids, ids, logits="none"))
            assert len(graphs) == count
        model = toy_model(n_layer=1)
        cache = KVCache(model.config, 1, 8, static=True)
        with torch.inference_mode():
            compile_for_decoding(model, runtime)(ids, cache=cache)
        assert len(graphs) == 3


def test_decoding_on_a_gpu_leaves_out_cudnn(monkeypatch):
    """It prepares a plan for each number of keys, and a cache grows with every token."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        pick_runtime("cuda", "bfloat16", False)
        assert torch.backends.cuda.cudnn_sdp_enabled(), "training has one shape"
        pick_runtime("cuda", "bfloat16", False, decoding_steps=300)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        pick_runtime("cuda", "bfloat16", False)  # bench.py --mode=decode,train
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_a_missing_compiler_is_one_warning(monkeypatch, capsys):
    compile = torch.compile
    torch.compiler.reset()

    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    def compile_with_backend(model, mode=None, **options):
        return compile(model, backend=backend, **options)
    monkeypatch.setattr(torch, "compile", compile_with_backend)
    model, runtime = toy_model(n_kv_head=2), pick_runtime("cpu", "float32", True)
    compiled = compile_for_decoding(model, runtime)
    out = list(generate(model, [[1, 2, 3]], 8, temperature=0, compiled=compiled))
    assert out == list(generate(model, [[1, 2, 3]], 8, temperature=0))
    assert not runtime.compile
    err = capsys.readouterr().err
    assert err.count("warning: torch.compile does not work here") == 1
    assert err.count("going on in eager mode") == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_the_real_compiler_gives_the_numbers_of_eager_mode(capsys):
    """With oneDNN's products, which torch.compile does not accept as they are: training, then
    decoding with packed weights."""
    torch.compiler.reset()
    runtime, ids = pick_runtime("cpu", "float32", True), toy_ids(3, 16)
    model = accelerate(toy_model(n_layer=1, n_kv_head=2))
    assert isinstance(model.layers[0].attn.q_proj, FastLinear)
    compiled = compile_model(model, runtime, lambda forward: forward(ids, ids, logits="none"))
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(ids, ids, logits="none")[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-3)
    prompts = [[1, 2, 3], [4, 5, 6]]
    plain = list(generate(model, prompts, 20, temperature=0))
    model = prepare_for_decoding(model, 2)
    compiled = compile_for_decoding(model, runtime)
    assert list(generate(model, prompts, 20, temperature=0, compiled=compiled)) == plain
    assert runtime.compile
    assert "warning" not in capsys.readouterr().err


def test_compile_auto_looks_at_the_number_of_tokens():
    assert not pick_runtime("cpu", "float32", "auto", 300).compile
    assert pick_runtime("cpu", "float32", "auto", 10**6).compile


# -- --mode=scale ----------------------------------------------------------------------------------

def test_scale_formulas_by_hand():
    config, model = bench.size_of("gpt2_124m")
    P, tables = 123_588_864, 50304 * 768
    assert costs.num_params(model) == P
    assert model.embed.weight.is_meta
    assert costs.state_bytes(model, 1, True) == P * 16 + P * 2 == 2_224_599_552
    assert costs.state_bytes(model, 64, False) == P * 16 + P * 2
    assert costs.state_bytes(model, 8, True) == P * 2 + 6 * (tables + (P - tables) / 6)
    assert costs.sent_bytes(P, 1, False) == costs.sent_bytes(P, 1, True) == 0
    assert costs.sent_bytes(P, 2, False) == 4 * P  # 2 (n - 1) / n = 1
    assert costs.sent_bytes(1000, 8, False) == 7000
    assert costs.sent_bytes(1000, 8, True, micro_steps=3) == 21000
    row = costs.scale(config, model, 64, False)  # 8 of 512 sequences each
    assert row["tokens"] == 2**19
    assert row["compute_s"] == pytest.approx(8192 * 854_654_976 / (0.4 * 989e12), rel=1e-9)
    assert row["communication_s"] == pytest.approx(2 * 63 / 64 * 4 * P / 400e9)
    inside = costs.scale(config, model, 8, False)
    assert inside["communication_s"] == pytest.approx(7 * P / 450e9)
    sharded = costs.scale(config, model, 8, True)
    assert sharded["sent"] == 4 * 7 * P  # 64 sequences each, 4 micro-steps of 16
    assert costs.scale(config, model, 1024, False)["tokens"] == 2**20  # one sequence each
    row = dict(tokens=1200, memory=100.0, recomputing=50.0, compute_s=3.0, communication_s=2.0)
    assert bench.speed(row, 112) == "240 to 400"
    assert bench.speed(row, 60) == "200 to 300, recomputing"
    assert bench.speed(row, 55) == "does not fit"
    assert bench.speed(dict(row, communication_s=0.0), 112) == "400"


def test_scale_falls_and_grows_as_it_must():
    gpus = (2, 8, 64, 1024)
    for name in bench.SIZES:
        config, model = bench.size_of(name)
        fsdp = [costs.scale(config, model, n, True) for n in gpus]
        ddp = [costs.scale(config, model, n, False) for n in gpus]
        for rows in (fsdp, ddp):
            assert all(row["recomputing"] < row["memory"] for row in rows)
            seconds = [row["compute_s"] for row in rows]
            assert seconds == sorted(seconds, reverse=True)
        states = [costs.state_bytes(model, n, True) for n in gpus]
        assert all(a > b for a, b in zip(states, states[1:], strict=False))
        assert states[0] < costs.state_bytes(model, 2, False)
        assert all(a["memory"] > b["memory"] for a, b in zip(fsdp, fsdp[1:], strict=False))
        # towards 8 bytes per parameter
        assert all(a["sent"] < b["sent"] for a, b in zip(ddp, ddp[1:], strict=False))


def bytes_kept_for_backward(model, ids):
    """Bytes that autograd keeps of a forward pass in bfloat16, beside the parameters."""
    seen = {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x
        return x
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(ids, ids, logits="none")
    for p in model.parameters():
        seen.pop(p.untyped_storage().data_ptr(), None)
    return sum(x.untyped_storage().nbytes() for x in seen.values())


@pytest.mark.parametrize("qk_norm", [True, False])
def test_activations_of_a_block_are_what_autograd_keeps(n_kv_head, qk_norm):
    """In bfloat16 on a CPU, where RMSNorm is not fused: it keeps two float32 copies of its input
    and a root mean square."""
    ids = toy_ids(2, 48)
    models = []
    for n_layer in (1, 2):
        model = toy_model(n_layer=n_layer, n_kv_head=n_kv_head, qk_norm=qk_norm, head_dim=16)
        models.append(accelerate(model))
    one, two = models
    c = two.config
    kept = bytes_kept_for_backward(two, ids) - bytes_kept_for_backward(one, ids)
    heads = c.n_head + c.n_kv_head
    weights = costs.num_params(two) - costs.num_params(one) - 2 * c.n_embd
    composite = 2 * (4 * c.n_embd + 4)
    if qk_norm:
        composite += 4 * heads * 16 + 4 * heads
    formula = costs.activation_bytes(c, 96) - costs.activation_bytes(one.config, 96)
    assert kept - 2 * weights == formula + 96 * composite  # copies of the weights in bfloat16
    recomputing = (costs.activation_bytes(c, 96, recompute=True)
                   - costs.activation_bytes(one.config, 96, recompute=True))
    assert recomputing == 96 * 4 * c.n_embd  # the input of one more block


def test_the_document_of_scale_is_the_committed_one(capsys):
    capsys.readouterr()
    bench.main(["--mode=scale"])
    text = capsys.readouterr().out
    committed = (ROOT / "docs/scale.md").read_bytes()
    assert text.encode() == committed, "run python bench.py --mode=scale > docs/scale.md"
    assert "does not fit" in text
    assert "not measured on a GPU (no GPU was at hand)" in text
    rows = re.findall(r"^\| \[(.+?)\].*?" + r" \| ([\d.,]+)" * 8, text, re.M)
    assert [row[0] for row in rows] == list(bench.SIZES)
    for name, _, _, tokens, hours, ddp, _, fsdp, recomputing in rows:
        words = [f"{tokens} billion tokens", f"{hours} GPU-hours", f"{ddp} GB"]
        if name == "llama_8b":
            words += [f"{fsdp} GB", f"{recomputing} GB"]
        said = " ".join((ROOT / f"config/{name}.py").read_text(encoding="utf-8").split())
        assert name == "gpt2_124m" or all(word in said for word in [*words, "not measured"]), name


@pytest.mark.parametrize("name,flops,bandwidth", [
    ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12), ("NVIDIA H100 PCIe", 756e12, 2.0e12),
    ("NVIDIA H100 NVL", 835e12, 3.9e12), ("NVIDIA H200", 989e12, 4.8e12), ("NVIDIA H200 NVL", 835e12, 4.8e12), ("NVIDIA GH200 480GB", 989e12, 4.0e12),
    ("NVIDIA A100-SXM4-40GB", 312e12, 1.56e12), ("NVIDIA A100-SXM4-80GB", 312e12, 2.04e12),
    ("NVIDIA A100 80GB PCIe", 312e12, 1.94e12), ("NVIDIA GeForce RTX 4090", 165e12, None), ("Another", None, None)])
def test_peaks_are_those_of_the_data_sheets(monkeypatch, name, flops, bandwidth):
    """Longer names contain shorter ones with other peaks."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    assert costs.peak_of(costs.PEAK_FLOPS, device) == flops
    assert costs.peak_of(costs.PEAK_BANDWIDTH, device) == bandwidth
    assert costs.peak_of(costs.PEAK_FLOPS, torch.device("cpu")) is None


def test_each_device_has_its_own_bandwidth(monkeypatch):
    """In a table over devices, rows of the second were divided by the bandwidth of the first."""
    def picked(device, *args):
        return SimpleNamespace(device=torch.device(device), describe=lambda: dict(device=device, dtype="", compile=""))
    monkeypatch.setattr(bench, "pick_runtime", picked)
    monkeypatch.setattr(bench, "bandwidth", lambda runtime: {"cpu": 1, "cuda": 2}[runtime.device.type])
    monkeypatch.setattr(bench, "decode", lambda config, runtime, peak: dict(peak=peak))
    monkeypatch.setattr(bench, "show", lambda *args: None)
    configs = [bench.BenchConfig(device=device) for device in ("cpu", "cuda", "cpu")]
    assert [row["peak"] for row in bench.time_all(configs)] == [1, 2, 1]


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_the_clock_waits_for_the_device(monkeypatch, device):
    """On Apple GPUs it read the time at which work was queued."""
    waited = []
    for name in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, name), "synchronize", lambda name=name: waited.append(name))
    bench.clock(SimpleNamespace(device=torch.device(device)))
    assert waited == [name for name in ("cuda", "mps") if name == device]


def test_a_row_says_what_was_timed(capsys, tmp_path):
    """Rows of several optimizers, or with and without fast.py, differed in nothing but their times."""
    table = result(capsys, "--mode=train", "--optimizer=adamw,muon", "--fast=True,False", "--steps=1", "--block_size=8", "--seed=3")
    assert [(row["optimizer"], row["fast"]) for row in table["rows"]] == [
        ("adamw", True), ("adamw", False), ("muon", True), ("muon", False)] and "seed" not in table["rows"][0]
    saver.save(tmp_path, dict(
        model=toy_model(n_kv_head=2, window=5).state_dict(), config=asdict(toy_config(n_kv_head=2, window=5)), optimizer={},
        settings={}, runtime={}, step=0, val_loss=None, tokenizer="none", dataset_sha256=""))
    bench.main(["--device=cpu", f"--out_dir={tmp_path}", "--prompt_len=8", "--new_tokens=2", "--repeats=1", "--batch_size=1,2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("n_kv_head 2" in line and "window 5" in line for line in lines[:2])


def test_memory_does_not_count_the_program_that_started_this_one():
    """Linux starts ru_maxrss at the peak of the parent: rows of compare.py were too low by its size, some exactly 0."""
    code = "import bench; print(bench.resident('VmHWM'))"

    def peak_of_a_child():
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)
    alone = peak_of_a_child()
    held = bytearray(b"x" * (alone + 2**29))
    assert 2**25 < peak_of_a_child() < alone + 2**27 < len(held)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"])
def test_parts_and_relatives_of_a_device_have_no_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert costs.peak_of(costs.PEAK_FLOPS, torch.device("cuda")) is None


def test_one_device_is_timed(monkeypatch, capsys):
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    assert "start it without torchrun" in fails(bench.main, ["--mode=train"], capsys)


def test_training_is_timed_as_it_is_done(monkeypatch):
    """Runs with recompute, or with a part of the weights, were timed as those without."""
    made = []

    def stop(config, *args):
        made.append((config.recompute, config.trainable))
        raise UserError("enough")
    monkeypatch.setattr(bench, "make_model", stop)
    config = bench.BenchConfig(mode="train", device="cpu", recompute=True, trainable="q_proj")
    with pytest.raises(UserError, match="enough"):
        bench.time_all([config])
    assert made == [(True, "q_proj")]
