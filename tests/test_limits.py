"""Memory and sizes: what cannot fit is refused at once, what might fit never is."""
import itertools
import json
import time

import numpy as np
import pytest
import torch
from conftest import load, peak_allocated, toy_config, toy_ids, toy_model
from test_inputs import fails, trained  # noqa: F401

import bench
import sample
import train
from model import GPT, GPTConfig, rope_frequencies
from nanogqa import costs, runtime
from nanogqa.batches import MicroBatch
from nanogqa.configurator import UserError, build, program
from nanogqa.costs import Decoding
from train import TrainConfig


def allocate_on_the_cpu():
    torch.empty(2**62, dtype=torch.uint8)


def allocate_in_numpy():
    np.ones(2**60, dtype=np.uint8)


def allocate_in_python():
    bytearray(2**62)


def refuse_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def overflow():
    torch.empty(2**40, 2**40)


def throw_bad_alloc():
    raise RuntimeError("std::bad_alloc")


def fork():
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("allocate", [
    allocate_on_the_cpu, allocate_in_numpy, allocate_in_python, refuse_on_a_gpu, overflow,
    throw_bad_alloc, fork])
def test_memory_that_cannot_be_allocated_is_one_sentence(capsys, allocate):
    @program(remedy="lower num_samples")
    def main(argv):
        allocate()
    assert "there is not enough memory: lower num_samples" in fails(main, [], capsys)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    @program
    def main(argv):
        raise RuntimeError("a mistake in this program")
    with pytest.raises(RuntimeError, match="a mistake"):
        main([])


@pytest.mark.parametrize("args,words", [
    (["--tokens_per_step=320000000000"], "lower tokens_per_step"),
    (["--tokens_per_step=320000000000", "--batch_size=None"], "tokens_per_step, or set batch_size"),
    (["--tokens_per_step=3200000000", "--batch_size=100000000"], "lower batch_size or block_size"),
    (["--vocab_size=1000000000000"], "lower n_layer"),
    (["--n_head=1000000000", "--head_dim=2"], "lower n_layer"),
    (["--n_layer=1000000000000"], "n_layer must be at most 1024"),
    (["--n_layer=2000000000"], "n_layer must be at most 1024"),
    (["--n_embd=1000000000000000"], "cannot be created"),
])
def test_training_that_cannot_fit(toy_run, tmp_path, capsys, args, words):
    began = time.perf_counter()
    assert words in fails(train.main, [*toy_run, *args], capsys)
    assert time.perf_counter() - began < 10 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("args", [["--num_samples=10000000"], ["--num_samples=4611686018427387904"],
                                  ["--num_samples=1000000000000", "--max_new_tokens=0"]])
def test_texts_that_cannot_fit(trained, capsys, monkeypatch, args):  # noqa: F811
    monkeypatch.setattr(runtime, "machine_memory", lambda: 16 * 2**30)
    began = time.perf_counter()
    error = fails(sample.main, [f"--out_dir={trained}", "--device=cpu", *args], capsys)
    assert "lower num_samples" in error and time.perf_counter() - began < 10


@pytest.mark.parametrize("args", [["--mode=decode"], ["--mode=decode", "--prefill=False"],
                                  ["--mode=train"]])
def test_timings_that_cannot_fit(capsys, args):
    began = time.perf_counter()
    shape = ["--n_layer=2", "--n_embd=32", "--batch_size=100000000", "--device=cpu"]
    error = fails(bench.main, [*args, *shape], capsys)
    assert "lower batch_size" in error and time.perf_counter() - began < 10


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=False), dict(attention="mla"),
                                     dict(n_kv_head=1, qkv_bias=True, n_layer=5)])
def test_parameters_are_counted_without_building_the_model(changes):
    config = toy_config(**changes)
    assert costs.count_params(GPT, config) == costs.num_params(GPT(config))


def test_the_floor_of_a_step_is_what_certainly_comes_with_the_weights():
    """4 bytes of weight, 4 of gradient, and 8 or (Muon) 4 of moments. An evaluation has weights alone; with trainable, the rest
    is not certain. Ranks of FSDP share all of it."""
    def floor(ranks=1, steps=1, **changes):
        return costs.training_floor(TrainConfig(n_layer=1, n_embd=32, **changes), 10**6, 1, ranks, steps)[costs.SIZE_SETTINGS]
    assert floor() == 16e6 and floor(optimizer="muon") == 12e6
    assert floor(steps=0) == floor(trainable="q_proj") == 4e6
    assert floor(ranks=4) == 16e6 and floor(ranks=4, parallel="fsdp") == 4e6


@pytest.mark.parametrize("changes", [{}, dict(optimizer="muon"), dict(recompute=True),
                                     dict(dtype="bfloat16"), dict(fast=False)])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_step_of_training_holds_at_least_the_floor(changes, batch_size):
    """Otherwise a run that would have worked could be refused."""
    tokens = batch_size * 32
    config = TrainConfig(n_layer=3, n_embd=32, block_size=32, vocab_size=65, batch_size=batch_size,
                         tokens_per_step=tokens, device="cpu", **changes)
    where = runtime.pick_runtime(config.device, config.dtype, config.compile)

    def step():
        with torch.inference_mode(False):
            model = train.make_model(config, None, where)
            optimizers = train.make_optimizers(model, config)
            x = toy_ids(batch_size, 33).numpy()
            batch = MicroBatch(x[:, :-1], x[:, 1:], seeds=None)
            train.backward(model, [batch], where)
            train.update(model, optimizers, 1.0)
    floor = costs.training_floor(config, costs.count_params(GPT, config), tokens, 1, 1)
    assert sum(floor.values()) - floor["tokens_per_step"] <= peak_allocated(step)


@pytest.mark.parametrize("kv_cache", [True, False])
def test_sampling_holds_at_least_the_floor(kv_cache):
    model, prompt, texts = toy_model(n_kv_head=2), toy_ids(1, 9)[0].tolist(), 10
    length = 0
    if kv_cache:
        length = 9 + 2
    decoding = Decoding(texts, 1, length)
    floor = costs.decoding_floor(model.config, costs.num_params(model), decoding, "texts")

    def run():
        for _ in sample.generate(model, [prompt], 2, texts, kv_cache=kv_cache):
            pass
    assert floor["texts"] <= peak_allocated(run)


def test_the_memory_of_a_control_group_counts(tmp_path, monkeypatch):
    files = {
        "/proc/self/cgroup": ["0::/a/b", "4:memory:/c", "3:cpu:/d"],
        "/sys/fs/cgroup/a/memory.max": ["max"],
        "/sys/fs/cgroup/a/b/memory.max": ["3000000000"],
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": ["2000000000"],
        "/proc/meminfo": ["MemTotal: 64000000 kB", "SwapTotal: 1000 kB"],
    }
    monkeypatch.setattr(runtime, "lines_of", lambda path: files.get(str(path), []))
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.os, "sysconf", lambda name: 2**18)
    assert runtime.machine_memory() == 2_000_000_000 + 1000 * 1024
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = ["9223372036854771712"]
    assert runtime.machine_memory() == 3_000_000_000 + 1000 * 1024
    files.clear()
    assert runtime.machine_memory() == 2**36
    runtime.check_memory({"n_layer": 2**35, "batch_size": 2**35})
    with pytest.raises(UserError, match="lower batch_size"):
        runtime.check_memory({"n_layer": 2**35, "batch_size": 2**35 + 1})


# -- extremes of settings --------------------------------------------------------------------------

@pytest.mark.parametrize("value", ["5e-324", "1.7e308"])
@pytest.mark.parametrize("name", [
    "learning_rate", "weight_decay", "grad_clip", "norm_eps", "rope_low_freq_factor", "dropout"])
def test_extreme_numbers_end_with_0_or_with_one_sentence(toy_run, capsys, name, value):
    args = [*toy_run, "--max_steps=1", "--n_layer=1", "--eval_tokens=32", "--tokens_per_step=128",
            f"--{name}={value}"]
    try:
        train.main(args)
    except SystemExit as exit:
        error = capsys.readouterr().err.strip()
        assert exit.code == 2 and error.count("\n") == 0, error


def test_frequencies_are_numbers_for_every_legal_setting_of_rope():
    extremes = (1e-30, 1.0, 1e30)
    for theta, low, high in itertools.product(extremes, repeat=3):
        if low < high:
            config = toy_config(rope_theta=theta, rope_factor=1e30, rope_original_block_size=2**62,
                                rope_low_freq_factor=low, rope_high_freq_factor=high)
            assert rope_frequencies(config).isfinite().all()


@pytest.mark.parametrize("args", [
    ["--temperature=5e-324"], ["--temperature=1e-40"], ["--temperature=1e-31"], ["--top_p=0"],
    ["--top_p=5e-324"], ["--top_k=1"]])
def test_extreme_draws_are_greedy(trained, capsys, args):  # noqa: F811
    common = [f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=12", "--prompt=the"]
    sample.main([*common, "--temperature=0"])
    greedy = capsys.readouterr().out
    sample.main([*common, *args])
    assert capsys.readouterr().out == greedy


def test_the_highest_temperature_draws_from_all(trained, capsys):  # noqa: F811
    sample.main([f"--out_dir={trained}", "--device=cpu", "--temperature=1.7e308",
                 "--max_new_tokens=60"])
    assert len(set(capsys.readouterr().out)) > 20


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 5000 + ")" * 5000, "(", "[z-a]"])
def test_patterns_that_do_not_compile(toy_run, capsys, pattern):
    assert "is not a regular expression" in fails(
        train.main, [*toy_run, f"--trainable={pattern}"], capsys)


@pytest.mark.parametrize("changes", [dict(n_layer=10**15), dict(n_layer=1025)])
def test_a_config_with_too_many_layers_is_refused_before_anything_is_built(changes):
    with pytest.raises(UserError, match="n_layer must be at most 1024"):
        build(GPTConfig, dict(vocab_size=65) | changes)


@pytest.mark.parametrize("changes,words", [
    (dict(n_layer=10**15), "ckpt.pt has settings that no model can have (n_layer must be at most 1024"),
    (dict(n_layer=1000), "do not fit its config"),
    (dict(n_head=10**9, head_dim=2, n_kv_head=1), "do not fit its config"),
    (dict(vocab_size=10**12), "do not fit its config"),
    (dict(n_ff=10**18), "cannot be created"),
])
def test_a_checkpoint_that_asks_for_more_than_it_holds(trained, tmp_path, capsys, changes, words):  # noqa: F811
    state = load(trained)
    state["config"].update(changes)
    torch.save(state, tmp_path / "ckpt.pt")
    began = time.perf_counter()
    assert words in fails(sample.main, [f"--out_dir={tmp_path}", "--device=cpu"], capsys)
    assert time.perf_counter() - began < 10


def test_a_checkpoint_of_a_very_long_context_is_sampled_from(trained, tmp_path, capsys):  # noqa: F811
    """block_size costs nothing by itself."""
    state = load(trained)
    state["config"].update(block_size=10**15)
    torch.save(state, tmp_path / "ckpt.pt")
    sample.main([f"--out_dir={tmp_path}", "--device=cpu", "--max_new_tokens=3", "--output=jsonl"])
    assert json.loads(capsys.readouterr().out)["prompt"] == ""
