"""Drawing tokens, keeping the context, ending texts, and sample.py as a program."""
import json
import weakref

import pytest
import torch
from conftest import load, peak_allocated, toy_ids, toy_model

import sample
import train
from nanogqa import saver
from nanogqa.tokenizer import Text, get_tokenizer, known_ids
from sample import context_start, generate, sample_token


def test_temperature_zero_is_argmax():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert sample_token(logits, temperature=0).tolist() == [[1], [0]]


def draws(logits, n=2000, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return torch.bincount(sample_token(torch.tensor([logits] * n), generator=generator, **kwargs)[:, 0], minlength=len(logits)) / n


@pytest.mark.parametrize("kwargs,expected", [
    (dict(), [0.1, 0.2, 0.3, 0.4]),
    (dict(top_k=0), [0.1, 0.2, 0.3, 0.4]),
    (dict(top_k=99), [0.1, 0.2, 0.3, 0.4]),
    (dict(top_k=2), [0, 0, 3 / 7, 4 / 7]),
    (dict(top_k=1), [0, 0, 0, 1]),
    (dict(top_p=1.0), [0.1, 0.2, 0.3, 0.4]),
    (dict(top_p=0.5), [0, 0, 3 / 7, 4 / 7]),
    (dict(top_p=0.75), [0, 2 / 9, 3 / 9, 4 / 9]),
    (dict(top_p=0.0), [0, 0, 0, 1]),
    (dict(top_k=3, top_p=0.99), [0, 2 / 9, 3 / 9, 4 / 9]),
    (dict(top_k=3, top_p=0.75), [0, 0, 3 / 7, 4 / 7]),  # of the three alone, two have 7/9
    (dict(temperature=0.5, top_p=0.5), [0, 0, 0, 1]),  # the temperature gives the last one 16/30
    (dict(temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
    (dict(temperature=1e-9), [0, 0, 0, 1]),
])
def test_draws_have_the_stated_distribution(kwargs, expected):
    shares = draws(torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist(), **kwargs)
    assert shares.tolist() == pytest.approx(expected, abs=0.04)
    assert all(share == 0 for share, p in zip(shares.tolist(), expected) if p == 0)


def test_top_p_keeps_no_more_than_it_needs():
    assert (draws([0.0, 0.0], top_p=0.5) > 0).sum() == 1


def test_top_k_keeps_exactly_k_on_ties():
    assert (draws([1.0, 1.0, 1.0, 0.0], top_k=2) > 0).sum() == 2


def test_forbidden_ids_are_never_drawn():
    known = known_ids(get_tokenizer("byte"), 300)
    model = toy_model(n_kv_head=2, vocab_size=300)
    with torch.no_grad():
        model.embed.weight[257:] *= 20  # the padding rows would win
    for options in (dict(temperature=0), dict(temperature=5.0), dict(temperature=5.0, top_k=290), dict(temperature=1.0, top_p=0.99)):
        assert max(max(ids) for _, ids in generate(model, [[65]], 40, 4, known, **options)) <= 256
    assert max(max(ids) for _, ids in generate(model, [[65]], 40, 4, None, temperature=5.0)) > 256


def test_context_rule():
    """With room for 8: everything up to 8 tokens, then the older half goes whenever it is full."""
    assert [context_start(n, 8) for n in range(1, 18)] == [0] * 8 + [4] * 4 + [8] * 4 + [12]
    for block_size in (1, 2, 3, 8, 9):
        for n in range(1, 40):
            assert 1 <= n - context_start(n, block_size) <= block_size
    assert context_start(100, 1) == 99


def texts(model, prompts, n, **kwargs):
    """The n new ids of every text, greedily where kwargs do not say otherwise."""
    out = {}
    for rows, ids in generate(model, prompts, n, **{"temperature": 0, **kwargs}):
        for row, token in zip(rows, ids):
            out.setdefault(row, []).append(token)
    return [out[row] for row in sorted(out)]


@pytest.mark.parametrize("prompt", [1, 11, 12, 13, 40], ids=["1", "block_size-1", "block_size", "block_size+1", "longer"])
def test_greedy_text_with_cache_is_the_text_of_full_forwards(n_kv_head, prompt):
    """The oracle is the plain forward over the context that the rule states, one call per token."""
    model, ids = toy_model(n_kv_head=n_kv_head, block_size=12, tie_embeddings=False), toy_ids(1, prompt)[0].tolist()
    (cached,), (plain,) = (texts(model, [ids], 30, kv_cache=kv_cache) for kv_cache in (True, False))
    oracle = list(ids)
    with torch.inference_mode():
        for _ in range(30):
            context = torch.tensor([oracle[context_start(len(oracle), 12):]])
            oracle.append(model(context)[0][0, -1].argmax().item())
    assert cached == plain == oracle[prompt:]
    assert len(set(cached)) > 5, "a text of one token would prove nothing"


def test_samples_of_one_batch_are_continuations_of_one_prefill():
    model, calls = toy_model(n_kv_head=2), []
    forward = model.forward
    model.forward = lambda idx, **kwargs: calls.append(tuple(idx.shape)) or forward(idx, **kwargs)
    drawn = texts(model, [[1, 2, 3, 4, 5]], 6, num_samples=3, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert calls == [(1, 5)] + [(3, 1)] * 5
    assert len({tuple(row) for row in drawn}) == 3
    greedy, alone = (texts(model, [[1, 2, 3, 4, 5]], 6, num_samples=n) for n in (3, 1))
    assert greedy == alone * 3


def test_prompts_of_unequal_length_give_the_texts_they_give_alone(n_kv_head):
    """As one batch, past the end of the context of each row, and with rows that end early."""
    model = toy_model(n_kv_head=n_kv_head, block_size=12, tie_embeddings=False)
    prompts = [toy_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 1, 40, 12)]
    alone = [texts(model, [prompt], 30)[0] for prompt in prompts]
    assert texts(model, prompts, 30) == alone and len({tuple(text) for text in alone}) == 5
    assert texts(model, prompts, 30, kv_cache=False) == alone
    assert texts(model, prompts, 5, num_samples=2) == [text[:5] for text in alone for _ in range(2)]

    ends, seen = [4, 30, 9, 1, 17], [0] * 5
    got, batches = [[] for _ in prompts], []
    for rows, ids in generate(model, prompts, 30, stopped=lambda row: seen[row] == ends[row], temperature=0):
        batches.append(len(rows))
        for row, token in zip(rows, ids):
            got[row].append(token)
            seen[row] += 1
    assert got == [text[:end] for text, end in zip(alone, ends)]
    assert batches == [5] + [4] * 3 + [3] * 5 + [2] * 8 + [1] * 13, "a finished row must cost nothing"


def feed(text, data):
    return "".join(text.add(token) for token in data) + text.finish()


def test_text_ends_at_end_of_text_and_before_the_stop_string():
    encoding = get_tokenizer("byte")
    assert feed(Text(encoding), [*b"ab", 256, *b"cd"]) == "ab"
    for stop, raw, expected in (("\n\n", b"a\nb\n\nc", "a\nb"), ("aab", b"aaab", "a"), ("xyz", b"xyxy", "xyxy"),
                                ("b", b"abc", "a"), ("END", b"EENEND", "EEN")):
        assert feed(Text(encoding, stop), raw) == expected
    text = Text(encoding, "aab")
    feed(text, b"aaab")
    assert text.done and text.finish() == ""
    text = Text(encoding, "stop")
    assert text.add(ord("s")) == "" and text.add(ord("o")) == "so", "held back only while it may be the stop string"


def test_text_replaces_what_is_not_utf8_and_waits_for_whole_characters():
    text = Text(get_tokenizer("byte"))
    first, second, third, fourth = "🙂".encode()
    assert [text.add(b) for b in (first, second, third)] == ["", "", ""] and text.add(fourth) == "🙂"
    assert feed(Text(get_tokenizer("byte")), [97, 0xFF, 98, first]) == "a\ufffdb\ufffd"


@pytest.fixture(scope="module")
def run_dir(toy_data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    train.main([f"--dataset={toy_data}", f"--out_dir={folder}", "--device=cpu", "--n_layer=2", "--n_head=4", "--n_kv_head=1",
                "--n_embd=32", "--block_size=32", "--batch_size=8", "--tokens_per_step=256", "--max_steps=60",
                "--eval_interval=60", "--eval_tokens=1024", "--warmup_steps=4", "--learning_rate=1e-2"])
    return folder


def say(capsys, run_dir, *args):
    capsys.readouterr()
    sample.main([f"--out_dir={run_dir}", "--device=cpu", *args])
    return capsys.readouterr()


def test_fast_false_samples_with_the_plain_modules(run_dir, monkeypatch, capsys):
    kinds, first, texts = [], sample.generate, []

    def looked_at(model, *args, **options):
        kinds.append({type(module) for module in model.modules()})
        return first(model, *args, **options)
    monkeypatch.setattr(sample, "generate", looked_at)
    for fast in (True, False):
        texts.append(say(capsys, run_dir, f"--fast={fast}", "--temperature=0", "--max_new_tokens=20").out)
    assert texts[0] == texts[1]
    assert torch.nn.Linear not in kinds[0] and torch.nn.Linear in kinds[1]


def test_standard_output_is_prompt_and_text_alone(run_dir, capsys):
    one = say(capsys, run_dir, "--prompt=the ", "--max_new_tokens=50", "--temperature=0")
    assert one.out.startswith("the ") and len(one.out) == 4 + 50 + 1
    assert "KV cache" in one.err and "tokens per second" in one.err
    plain = say(capsys, run_dir, "--prompt=the ", "--max_new_tokens=50", "--temperature=0", "--kv_cache=False")
    assert plain.out == one.out and "no KV cache" in plain.err
    three = say(capsys, run_dir, "--prompt=the ", "--max_new_tokens=50", "--temperature=0", "--num_samples=3")
    assert three.out == one.out * 3


def test_the_checkpoint_does_not_stay_in_memory_while_a_text_grows(run_dir, monkeypatch, capsys):
    """Its float32 weights and moments took three times the memory of the model."""
    held = []
    load, first = sample.checkpoint.load, sample.generate

    def loading(*args):
        state = load(*args)
        held.extend(weakref.ref(x) for x in state["model"].values())
        return state

    def generating(*args, **options):
        assert held and all(reference() is None for reference in held)
        return first(*args, **options)
    monkeypatch.setattr(sample.checkpoint, "load", loading)
    monkeypatch.setattr(sample, "generate", generating)
    sample.main([f"--out_dir={run_dir}", "--max_new_tokens=2", "--dtype=bfloat16"])


def test_seed_decides_the_text(run_dir, capsys):
    texts = [say(capsys, run_dir, "--max_new_tokens=40", f"--seed={seed}", "--temperature=1.5").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_prompt_from_a_file_and_stop_with_a_newline(run_dir, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("a line\nand ")
    out = say(capsys, run_dir, f"--prompt=FILE:{tmp_path / 'prompt.txt'}", "--stop=\\n", "--max_new_tokens=400").out
    assert out.startswith("a line\nand ") and out.count("\n") == 2 and out.endswith("\n")
    assert say(capsys, run_dir, "--prompt=abc", "--max_new_tokens=0").out == "abc\n"


def test_a_file_of_prompts(run_dir, capsys, tmp_path):
    prompts = ["the ", "a much longer prompt than the first ", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p if i else dict(prompt=p)) + "\n" for i, p in enumerate(prompts)))
    options = ("--max_new_tokens=40", "--temperature=0")
    alone = [say(capsys, run_dir, f"--prompt={prompt}", *options).out for prompt in prompts]
    assert say(capsys, run_dir, f"--prompts={tmp_path / 'prompts.txt'}", *options).out == "".join(alone)
    expected = [dict(prompt=p, text=text[len(p):-1]) for p, text in zip(prompts, alone)]
    for n in (1, 2):
        lines = say(capsys, run_dir, f"--prompts={tmp_path / 'prompts.jsonl'}", *options, "--output=jsonl", f"--num_samples={n}").out
        assert [json.loads(line) for line in lines.removesuffix("\n").split("\n")] == [text for text in expected for _ in range(n)]


def test_json_lines_hold_what_the_terminal_cannot_print(run_dir, capsys, tmp_path):
    """They had question marks there."""
    (tmp_path / "prompts.jsonl").write_text('"\\ud83d"\n"\u00e9\u2028"\n', encoding="utf-8")
    out = say(capsys, run_dir, f"--prompts={tmp_path / 'prompts.jsonl'}", "--output=jsonl", "--max_new_tokens=0").out
    assert out.isascii() and [json.loads(line)["prompt"] for line in out.splitlines()] == ["\ud83d", "\u00e9\u2028"]


def test_any_temperature_draws_none_of_the_forbidden_ids():
    """Beyond the largest float32, -inf of a forbidden id became NaN."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).expand(50, -1)
    generator = torch.Generator().manual_seed(1)
    for temperature in (1e29, 1e39, 1.7e308):
        drawn = sample_token(logits, temperature, generator=generator)
        assert set(drawn.flatten().tolist()) == {0, 1}


def test_a_row_that_ends_does_not_double_the_cache():
    """All layers were copied before the first of the old ones was freed."""
    model, prompts = toy_model(n_layer=6, n_embd=32, block_size=512).eval(), [[1, 2, 3]]
    count = 0

    def stopped(row):
        return row == 0 and count > 3

    def run():
        nonlocal count
        for _ in generate(model, prompts, 500, num_samples=64, temperature=0, stopped=stopped):
            count += 1
            if count > 6:
                return
    cache = 6 * 2 * 64 * 503 * 32 * 4  # layers, keys and values, rows, tokens, width, bytes
    assert cache < peak_allocated(run) < 1.5 * cache


def test_padding_rows_of_the_vocabulary_are_never_drawn(toy_run, tmp_path, capsys, monkeypatch):
    """They would win here, and have no text."""
    train.main([*toy_run, "--vocab_size=300", "--max_steps=1"])
    state = load(tmp_path / "run")
    state["model"]["embed.weight"][257:] *= 1000
    saver.save(tmp_path / "run", state)
    drawn, add = [], sample.Output.add
    monkeypatch.setattr(sample.Output, "add", lambda self, rows, ids: (drawn.extend(ids), add(self, rows, ids)))
    say(capsys, tmp_path / "run", "--max_new_tokens=30", "--temperature=5", "--output=jsonl")
    assert drawn and max(drawn) <= 256
