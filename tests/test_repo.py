"""The repository as a whole: its configs, its settings, its README and the direction of its imports."""
import ast
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import keys_of
from test_inputs import program as prepare

from bench import SIZES, BenchConfig
from compare import CompareConfig
from convert import COMMANDS
from nanogqa.batches import batch_shape
from nanogqa.configurator import build, help_text, kinds_of, parse, subset
from nanogqa.costs import num_params
from nanogqa.writer import PrepareConfig
from model import GPT, GPTConfig
from sample import SampleConfig
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
HubConfig = prepare("hub").__wrapped__.__globals__["HubConfig"]
RecallConfig = prepare("recall").__wrapped__.__globals__["RecallConfig"]
PROGRAMS = {"train.py": TrainConfig, "sample.py": SampleConfig, "bench.py": BenchConfig,
            "compare.py": CompareConfig, **{f"convert.py {name}": cls for name, (_, cls) in COMMANDS.items()}, **{f"data/{name}/prepare.py": PrepareConfig
                                                                  for name in ("python", "shakespeare", "text")},
            "data/hub/prepare.py": HubConfig, "data/recall/prepare.py": RecallConfig}
CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.py"))
GPT2 = {"gpt2_350m.py": 354.8e6, "gpt2_1.5b.py": 1557.6e6}  # parameters, with another MLP
# layers, width, query heads, key/value heads, MLP, ids, tables of Llama 3.2 1B and 3.1 8B
LLAMA = {"llama_1b.py": (16, 2048, 32, 8, 8192, 128256, 1), "llama_8b.py": (32, 4096, 32, 8, 14336, 128256, 2)}


def llama_parameters(layers, width, heads, kv_heads, mlp, ids, tables):
    attention = 2 * width * width + 2 * width * width * kv_heads // heads
    return tables * ids * width + layers * (attention + 3 * width * mlp + 2 * width) + width


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"cache.py"}))
def test_every_config_builds_a_model_that_runs(name):
    config = build(TrainConfig, parse(TrainConfig, [f"config/{name}"], ""))
    config.vocab_size = config.vocab_size or 257
    if name in GPT2 | LLAMA:
        with torch.device("meta"):  # shapes alone: the largest would take 32 GB
            model = GPT(subset(GPTConfig, config))
        if name in LLAMA:
            assert num_params(model) == llama_parameters(*LLAMA[name])
        else:
            assert num_params(model) == pytest.approx(GPT2[name], rel=0.03)
        return
    model = GPT(subset(GPTConfig, config))
    with torch.inference_mode():
        logits = model(torch.zeros(1, 4, dtype=torch.long))[0]
    assert logits.shape == (1, 4, config.vocab_size) and logits.isfinite().all()
    if name == "gpt2_124m.py":  # SwiGLU's three matrices at 8/3 weigh what GPT-2's two at 4 do
        assert 120e6 < num_params(model) < 130e6


def test_variants_differ_in_n_kv_head_and_out_dir_alone():
    base = TrainConfig()
    for name, kv in (("mha", base.n_head), ("gqa", 2), ("mqa", 1)):
        given = parse(TrainConfig, [f"config/{name}.py"], "")
        assert set(given) == {"n_kv_head", "out_dir"} and given["out_dir"] == f"out/{name}"
        assert build(TrainConfig, given).n_kv_head == kv
    assert parse(TrainConfig, ["config/mla.py"], "") == dict(attention="mla", out_dir="out/mla")
    composed = build(TrainConfig, parse(TrainConfig, ["config/gpt2_124m.py", "config/gqa.py"], ""))
    assert (composed.n_layer, composed.n_head, composed.n_kv_head, composed.out_dir) == (12, 12, 2, "out/gpt2_124m/gqa")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("variant,kv", [("mha", None), ("gqa", 2), ("mqa", 1)])
def test_sizes_compose_with_variants_and_share_their_steps_out(name, variant, kv):
    config = build(TrainConfig, parse(TrainConfig, [f"config/{name}.py", f"config/{variant}.py"], ""))
    assert (config.n_kv_head, config.out_dir) == (kv or config.n_head, f"out/{name}/{variant}")
    assert batch_shape(config, 1)[0] == batch_shape(config, 8)[0] == config.batch_size and config.head_dim % 8 == 0


def test_model_settings_have_one_set_of_defaults():
    for key in keys_of(GPTConfig):
        assert key in keys_of(TrainConfig) and key not in TrainConfig.__dict__.get("__annotations__", {}), key


# the root files that read the settings of a program: another program may have one of the same name
READERS = {TrainConfig: ("model", "train"), SampleConfig: ("sample",), BenchConfig: ("model", "train", "bench"),
           CompareConfig: ("model", "train", "bench", "compare")}


@pytest.mark.parametrize("cls", [*dict.fromkeys(PROGRAMS.values())], ids=lambda cls: cls.__name__)
def test_every_setting_is_in_the_help_and_is_read(cls):
    text = help_text(cls, "doc")
    for key in keys_of(cls):
        assert re.search(rf"^  --{key}={re.escape(str(getattr(cls, key)))} +\S", text, re.M), key
    read = set()
    root = [ROOT / f"{name}.py" for name in READERS[cls]] if cls in READERS else list(ROOT.glob("*.py"))
    for path in [*root, *ROOT.glob("nanogqa/*.py"), *ROOT.glob("data/*/prepare.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:  # config.n_head, c.n_head, model.config.n_head
                case ast.Attribute(value=ast.Name(id="config" | "c" | "base") | ast.Attribute(attr="config"), attr=attr, ctx=ast.Load()):
                    read.add(attr)
                case ast.FunctionDef(name="cache_specs"):  # GPTConfig reads its own settings there
                    read.update(inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute))
    assert set(keys_of(cls)) <= read


@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig, BenchConfig, CompareConfig], ids=lambda cls: cls.__name__)
def test_help_is_under_headings_and_shows_choices(cls):
    """The program's own settings come first, then the model's; all choices of a Literal are in its line."""
    lines = help_text(cls, "doc").splitlines()
    headings = [line for line in lines[3:] if line.endswith(":") and not line.startswith(" ")]
    first = [line for line in lines[3:] if line.strip()][0]
    assert first == headings[0] != "model:" and len(headings) >= 2
    for field in fields(cls):
        choices = [str(choice) for kind in kinds_of(cls, field.name) for choice in get_args(kind)]
        [line] = [line for line in lines if line.startswith(f"  --{field.name}=")]
        text = line.split(maxsplit=1)[1]
        for choice in choices:
            assert re.search(rf"\b{choice}\b", text), (field.name, choice)


def test_help_lists_choices_unless_the_text_explains_each():
    lines = help_text(BenchConfig, "doc").splitlines() + help_text(TrainConfig, "doc").splitlines()
    ends = {line.split("=")[0].strip(): line for line in lines if line.startswith("  --")}
    assert ends["--schedule"].endswith("(cosine, wsd)") and ends["--compile"].endswith("(auto, True, False)")
    assert not ends["--mode"].endswith("(decode, train, scale)") and not ends["--parallel"].endswith("(ddp, fsdp)")


PROGRAM_ORDER = ["model", "train", "sample", "bench", "compare", "convert"]
PACKAGE_ORDER = ["cache", "configurator", "files", "schema", "distributed", "dropout", "fast", "costs", "terminal", "runtime", "timing", "log", "tokenizer",
                 "hf_tokenizer", "prompts", "dataloader", "batches", "writer", "folder", "saver", "checkpoint", "hf_model", "resume", "results", "runs", "estimates", "published", "summary", "pictures", "report", "pool"]


def imported(path):
    """The modules that a file imports anywhere, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "nanogqa":
            names += [f"nanogqa.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return names


def test_programs_import_one_way():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(PROGRAM_ORDER)
    for i, name in enumerate(PROGRAM_ORDER):
        assert not set(imported(ROOT / f"{name}.py")) & set(PROGRAM_ORDER[i:]), name


def test_the_package_imports_one_way_and_never_a_program():
    assert sorted(path.stem for path in (ROOT / "nanogqa").glob("*.py")) == sorted([*PACKAGE_ORDER, "__init__"])
    for i, name in enumerate(PACKAGE_ORDER):
        names = set(imported(ROOT / "nanogqa" / f"{name}.py"))
        assert not names & set(PROGRAM_ORDER), name
        assert not names & {f"nanogqa.{later}" for later in PACKAGE_ORDER[i:]}, name


def test_the_model_imports_torch_alone():
    standard = {"hashlib", "math", "dataclasses", "typing"}
    assert {name.split(".")[0] for name in imported(ROOT / "model.py")} == {"torch"} | standard
    assert set(imported(ROOT / "nanogqa" / "cache.py")) == {"copy", "torch"}


def without_encoding(path):
    """Lines of a file that open a text file, or read a process as text, in the encoding of the terminal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        where = ast.unparse(node.func)
        if name in ("run", "Popen", "check_output"):
            text = "text" in given or "universal_newlines" in given
        elif name == "open" and where in ("os.open", "tokenize.open", "Image.open"):
            text = False
        elif name in ("open", "fdopen"):
            at = 0 if name == "open" and isinstance(node.func, ast.Attribute) else 1  # Path.open(mode)
            mode = given.get("mode", node.args[at] if len(node.args) > at else None)
            text = not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
        else:
            # functions of this project that are called read_text take a path
            text = name in ("read_text", "write_text", "TextIOWrapper") and isinstance(node.func, ast.Attribute)
        if text and "encoding" not in given:
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_text_file_is_utf8_whatever_the_terminal_is():
    """Under LC_ALL=C, text beyond ASCII could not be written, or was read as something else."""
    found = []
    for folder in (".", "nanogqa", "data/*", "docs", "results"):
        for path in ROOT.glob(f"{folder}/*.py"):
            found += without_encoding(path)
    assert found == []


def test_the_encoding_of_each_way_to_open_a_file_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "a.py"
    bad = ("open(p)", "open(p, 'w')", "path.open()", "path.open('a')", "path.read_text(errors='replace')",
           "path.write_text(t)", "subprocess.run(c, text=True)", "os.fdopen(3, 'w')", "open(p, mode)")
    good = ("open(p, 'rb')", "open(p, mode, encoding=e)", "path.open('wb')", "path.read_text(encoding='utf-8')",
            "os.open(p, 1)", "subprocess.run(c)", "read_text(p)")
    for text in bad + good:
        path.write_text(text, encoding="utf-8")
        assert bool(list(without_encoding(path))) == (text in bad), text


ALONE = """
import torch
from cache import KVCache
from model import GPT, GPTConfig
config = GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_kv_head=2, n_embd=32)
model, text = GPT(config), torch.arange(8 * 33).reshape(8, 33) % 13
optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
for step in range(10):
    loss = model(text[:, :-1], text[:, 1:])[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
cache, token, full = KVCache(config, 1, 32), text[:1, :5], text[:1, :5]
for _ in range(8):
    token = model(token, cache=cache, logits="last")[0][:, -1].argmax(-1, keepdim=True)
    full = torch.cat((full, model(full)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert token.item() == full[0, -1]
print(loss.item())
"""


def test_the_model_trains_and_decodes_alone(tmp_path):
    """model.py and cache.py in an empty folder, in a process that finds nothing else of this repository."""
    shutil.copy(ROOT / "model.py", tmp_path)
    shutil.copy(ROOT / "nanogqa" / "cache.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True,
                          text=True, check=True, timeout=100)
    assert float(done.stdout) < 2.5, "ln(65) = 4.2 before training"


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_readme_opens_with_two_commands_of_their_own():
    train, test = readme_commands()[:2]
    for command, end in ((train, "torchrun train.py config/gqa.py"), (test, "python -m pytest")):
        assert command == f"python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt && {end}"


def test_readme_names_the_pinned_torch():
    [version] = re.findall(r"CPU build of torch ([\d.]+\d)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert f"torch=={version} " in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_requirements_pin_what_pyproject_allows():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M))
    ranges = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert ranges.keys() - {"matplotlib", "transformers", "safetensors", "pyarrow", "huggingface_hub", "ruff"} == pins.keys() >= {"torch", "numpy", "tiktoken", "tqdm", "wandb"}  # extras apart
    for name, pin in pins.items():
        assert [int(n) for n in pin.split(".")] >= [int(n) for n in ranges[name].split(".")]


STARTS = """
import sys, torch
before = set(sys.modules)
import bench, compare, convert, sample, train
from nanogqa import checkpoint
config = train.GPTConfig(vocab_size=65, n_layer=1)
model = checkpoint.load_model(train.GPT, config, dict(model=train.GPT(config).state_dict()))
list(sample.generate(sample.prepare_for_decoding(model.eval(), 1), [[1, 2]], 3))
print(sorted(set(sys.modules) - before))
"""


def test_scripts_that_prepare_data_start_without_torch():
    """They imported it for the one function that writes plurals."""
    for name in ("python", "text", "hub", "recall", "shakespeare"):
        code = f"import runpy, sys; runpy.run_path('data/{name}/prepare.py'); print('torch' in sys.modules)"
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, encoding="utf-8", timeout=100).stdout
        assert out == "False\n", name


def test_programs_start_without_what_few_runs_need():
    """A model without values used to import the compiler, through torch.nn's initialization."""
    out = subprocess.run([sys.executable, "-c", STARTS], cwd=ROOT, capture_output=True, check=True,
                         encoding="utf-8", timeout=100).stdout
    imported = ast.literal_eval(out.splitlines()[-1])
    assert "nanogqa.fast" in imported
    for late in ("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
                 "torch.distributed.tensor", "transformers", "matplotlib", "wandb"):
        assert late not in imported, late
