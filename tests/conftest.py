import os
import random
import signal
from dataclasses import fields

import pytest
import torch

from nanogqa.writer import write_dataset
from model import GPT, GPTConfig
from nanogqa.cache import KVCache
from nanogqa import checkpoint

# two processes run tests: threads that wait for each other would take the time of the other process
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# files with few but long tests: started last, they would leave the other process without work
LONG = ("test_gpu.py", "test_faults.py", "test_recall.py", "test_fuzz.py", "test_hostile.py", "test_running.py", "test_train.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(params=[4, 2, 1], ids=["mha", "gqa", "mqa"])
def n_kv_head(request):
    return request.param


def toy_config(**changes):
    return GPTConfig(**{**dict(block_size=48, vocab_size=65, n_layer=2, n_head=4, n_embd=32, n_ff=64), **changes})


def toy_model(**changes):
    """A small model whose every parameter matters: larger weights than at the start of training, norms that are not 1."""
    model = GPT(toy_config(**changes), seed=changes.get("n_kv_head") or 7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.mul_(10)
    return model.eval()


def toy_ids(batch=2, length=48, vocab=65, seed=0):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A small byte data set of made-up sentences; its folder, as text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(60)]
    text = [" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(400)]
    folder = tmp_path_factory.mktemp("toy")
    write_dataset([("train", "".join(text[:360])), ("val", "".join(text[360:]))], folder, "byte")
    return str(folder)


@pytest.fixture
def toy_run(toy_data, tmp_path):
    """Arguments of a training run that takes a second."""
    return [f"--dataset={toy_data}", f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--n_layer=2", "--n_head=4",
            "--n_kv_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--tokens_per_step=256", "--max_steps=20",
            "--eval_interval=10", "--eval_tokens=1024", "--log_interval=5", "--warmup_steps=4"]


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run that was stopped keeps its handlers to the end of the process, which is here that of the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def check_ragged(model, chunks, static):
    """Fillers at the beginning of the shorter rows; the logits of real tokens are those of the row alone."""
    rows = [toy_ids(1, n, seed=n)[0] for n in (15, 9, 4)]
    idx = torch.stack([torch.cat((torch.full((15 - len(row),), 7), row)) for row in rows])
    with torch.inference_mode():
        cache = KVCache(model.config, 3, 15, static=static)
        cache.padding = torch.tensor([0, 6, 11])
        out = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1)
        for i, row in enumerate(rows):
            torch.testing.assert_close(out[i, 15 - len(row):], model(row[None])[0][0], atol=1e-4, rtol=1e-4)
        kept = KVCache(model.config, 3, 15, static=static)
        kept.padding = torch.tensor([0, 6, 11])
        model(idx[:, :14], cache=kept)
        out = model(idx[[2, 0], 14:], cache=kept.rows([2, 0]))[0]
        torch.testing.assert_close(out[:, 0], torch.stack([model(rows[i][None])[0][0, -1] for i in (2, 0)]), atol=1e-4, rtol=1e-4)
        if not kept.has_rings:
            kept.rewind(3)
            assert kept.length == 3


@pytest.fixture
def graphs(monkeypatch):
    """A list that grows by one with every graph of torch.compile; they run without optimization."""
    torch.compiler.reset()
    made, compile = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def compile_with_backend(model, mode=None, **options):
        return compile(model, backend=backend, **options)
    monkeypatch.setattr(torch, "compile", compile_with_backend)
    return made


def kept_in_memory(function):
    """function, whose first answer is that of all further calls."""
    answers = []

    def first_answer(*args):
        if not answers:
            answers.append(function(*args))
        return answers[0]
    return first_answer


def peak_allocated(function):
    """The most bytes that torch's allocator had handed out while function ran: the same on every machine."""
    now = peak = 0
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    for event in sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def load(out_dir):
    """The state of a checkpoint."""
    return checkpoint.load(out_dir, GPTConfig)


def model_of(state):
    return checkpoint.load_model(GPT, GPTConfig(**state["config"]), state)


def load_model(out_dir):
    return model_of(load(out_dir))


def keys_of(cls):
    return [f.name for f in fields(cls)]
