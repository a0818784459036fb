"""bench.py: what it prints, and that what it times is the model."""
import json

import pytest
import torch
from conftest import toy_ids, toy_model

import bench
import sample
import train
from model import KVCache
from sample import generate, prefill, prepare_for_decoding

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
        monkeypatch.setattr(sample, "PREFILL_CHUNK", chunk)
        texts.append([new for _, (new,) in generate(model, [ids[0].tolist()], 12, temperature=0)])
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 3
    calls, cache = [], KVCache(model.config, 1, 48)
    monkeypatch.setattr(sample, "PREFILL_CHUNK", 7)
    with torch.inference_mode():
        logits = prefill(lambda idx, **kwargs: calls.append(idx.size(1)) or model(idx, **kwargs), ids, cache)
        torch.testing.assert_close(logits, model(ids, logits="last")[0], atol=1e-4, rtol=1e-4)
    assert calls == [7, 7, 7, 7, 2]


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
    (["--mode=train", "--out_dir=x"], "out_dir is for --mode=decode")])
def test_bad_settings_of_bench(capsys, args, words):
    with pytest.raises(SystemExit) as exit:
        bench.main([*SHAPE, *args])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and words in error and "\n" not in error
