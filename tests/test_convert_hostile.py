"""from_hf and hostile folders, to_hf and a full disk: 0, or 2 with one line and nothing left."""
import itertools
import json
import os
import random
import shutil
import time

import pytest
from conftest import toy_model
from test_convert import TINY, command, make_hf, save, sentencepiece_like
from test_inputs import fails

import convert
from model import GPTConfig
from nanogqa import hf_tokenizer

VALUES = [
    None, True, -1, 0, 1, 3, 1.5, 1e308, 10**7, 10**12, 10**30, "x", "", "\ud800", "../x", [], [1],
    [-1], ["a"], {}, {"a": 1}, float("nan"), "DELETE",
]  # fmt: skip
MORE_KEYS = {  # of config.json, beside those that transformers writes
    "head_dim": 8,
    "rope_scaling": None,
    "rope_theta": 1e4,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 2,
    "partial_rotary_factor": 1.0,
    "auto_map": {},
    "tokenizer_class": None,
    "return_dict": True,
    "attn_implementation": "eager",
}
SPECIAL = dict(eos_token_id=[2, 5], bos_token_id=1, pad_token_id=0)
ABOUT = dict(
    tokenizer_class="PreTrainedTokenizerFast",
    eos_token=dict(content="</s>"),
    bos_token="<s>",
    model_max_length=64,
    add_bos_token=True,
    tiktoken="gpt2",
    stop_token_ids=[2],
    auto_map={},
    added_tokens_decoder={},
)


def paths_in(value, depth=4):
    """The places in a JSON value, as tuples of keys; of a long list or dict the first six."""
    found = []
    if depth and isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:30] if depth == 4 else keys[:6]:
            found.append((key,))
            found += [(key, *rest) for rest in paths_in(value[key], depth - 1)]
    return found


def changed(content, path, value):
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(value, str) and value == "DELETE":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy Llama with every file that from_hf reads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    import tokenizers

    path = tmp_path_factory.mktemp("hostile") / "hf"
    before = TINY["vocab_size"]
    TINY["vocab_size"] = 270
    make_hf(transformers, path, "llama2")
    TINY["vocab_size"] = before
    sentencepiece_like(tokenizers).save(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(MORE_KEYS | config))
    (path / "generation_config.json").write_text(json.dumps(SPECIAL))
    (path / "tokenizer_config.json").write_text(json.dumps(ABOUT))
    return path


def cases(folder, name, n):
    """n of the mutations of a file, and the content of each."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    every = list(itertools.product(paths_in(content), range(len(VALUES))))
    random.Random(7).shuffle(every)
    yield ("nothing",), "changed", content
    for path, i in every[:n]:
        yield path, VALUES[i], changed(content, path, VALUES[i])


@pytest.mark.parametrize(
    "name,n",
    [
        ("config.json", 65),
        ("tokenizer.json", 60),
        ("tokenizer_config.json", 15),
        ("generation_config.json", 10),
    ],
)
def test_one_value_changed(folder, tmp_path, capfd, name, n):
    n = int(os.environ.get("HOSTILE_CASES", n))  # more, by hand
    for path, value, content in cases(folder, name, n):
        hf, ours = tmp_path / "hf", tmp_path / "ours"
        shutil.copytree(folder, hf)
        (hf / name).write_text(json.dumps(content))
        began, code = time.monotonic(), 0
        try:
            convert.main(command("from_hf", hf_dir=hf, out_dir=ours))
        except SystemExit as exit:
            code = exit.code
        error = capfd.readouterr().err
        if name == "tokenizer.json" and "panicked at" in error:  # which Rust prints by itself
            error = error[error.index("convert.py: "):]
        case = (name, path, str(value), code, error)
        assert time.monotonic() - began < 20, case
        assert "Traceback" not in error, case
        assert code in (0, 2) and (code == 0) == (ours / "ckpt.pt").exists(), case
        if code == 2:
            assert error.count("\n") == 1 and "\n" not in error.strip(), case
        shutil.rmtree(ours, ignore_errors=True)
        shutil.rmtree(hf)
        assert not list(tmp_path.iterdir()), case
        assert path != ("nothing",) or code == 0, case


@pytest.mark.parametrize(
    "file,change,words",
    [
        ("config.json", dict(num_hidden_layers=1000), "num_hidden_layers=1000, but layer_types lists 2"),
        ("config.json", dict(num_hidden_layers=10**12), "n_layer must be at most"),
        ("config.json", dict(num_hidden_layers=10**30), "n_layer must be a whole number"),
        ("config.json", dict(layer_types=5), "layer_types is 5"),
        ("config.json", dict(eos_token_id="x"), "eos_token_id is 'x'"),
        ("config.json", dict(eos_token_id=-1), "eos_token_id is -1"),
        ("config.json", dict(eos_token_id=[2, None]), "eos_token_id is a list"),
        ("config.json", dict(eos_token_id=2**40), "eos_token_id is 1099511627776"),
        ("generation_config.json", dict(eos_token_id=[[2]]), "eos_token_id is a list"),
        ("tokenizer_config.json", dict(eos_token=["</s>"]), "eos_token is a list"),
        ("tokenizer_config.json", dict(stop_token_ids=2), "stop_token_ids is 2"),
        ("tokenizer_config.json", dict(tiktoken=5), "tiktoken is 5"),
    ],
    ids=str,
)
def test_hostile_values_are_named(folder, tmp_path, capsys, file, change, words):
    """Within seconds: what a file may ask for is bounded by what the weight files hold."""
    shutil.copytree(folder, tmp_path / "hf")
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (tmp_path / "hf" / file).write_text(json.dumps(content | change))
    began = time.monotonic()
    arguments = command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours")
    error = fails(convert.main, arguments, capsys)
    assert words in error and file in error and time.monotonic() - began < 10
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", ["../model", "a\ud800b", "", "..", 5, None, ["x"]], ids=repr)
def test_names_of_weight_files_cannot_lead_elsewhere(folder, tmp_path, capsys, name):
    shutil.copytree(folder, tmp_path / "hf")
    index = json.dumps(dict(weight_map={"model.norm.weight": name}))
    (tmp_path / "hf/model.safetensors").unlink()  # it would be read instead
    (tmp_path / "hf/model.safetensors.index.json").write_text(index)
    arguments = command("from_hf", hf_dir=tmp_path / "hf", out_dir=tmp_path / "ours")
    assert "which is not a base name" in fails(convert.main, arguments, capsys)


@pytest.mark.parametrize("arguments", ["to_hf --hf_dir=", "from_hf --hf_dir=", "pool --new_dir="])
def test_empty_names_of_folders(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    source = save(toy_model(n_kv_head=4), tmp_path / "from")
    arguments = arguments.split()
    if arguments[0] != "from_hf":
        arguments.append(f"--out_dir={source}")
    if arguments[0] == "pool":
        arguments.append("--n_kv_head=2")
    assert "must not be empty" in fails(convert.main, arguments, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_from_hf_without_a_name_for_its_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*command("from_hf", hf_dir=folder), "--out_dir="]
    assert "must not be empty" in fails(convert.main, arguments, capsys)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # "." is a name, too
    convert.main(command("from_hf", hf_dir=folder, out_dir="."))
    assert (tmp_path / "empty/ckpt.pt").exists()


@pytest.mark.parametrize("room", [100, 6_000, 90_000])
def test_to_hf_on_a_full_disk_leaves_nothing(folder, tmp_path, capsys, room):
    """No file may be longer than room: weights first, then the tokenizer."""
    resource = pytest.importorskip("resource")
    model = toy_model(n_kv_head=2, n_layer=1, n_embd=16, vocab_size=257)
    source = save(model, tmp_path / "from", "byte")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    arguments = command("to_hf", out_dir=source, hf_dir=tmp_path / "hf")
    try:
        if room < 90_000:
            error = fails(convert.main, arguments, capsys)
            assert "cannot write" in error and "File too large" in error
        else:
            convert.main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "hf/tokenizer.json").exists() == (room == 90_000)
    assert len(list(tmp_path.iterdir())) == 1 + (room == 90_000)


def test_a_tokenizer_that_cannot_be_written_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    class Full:
        def save(self, path):
            raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr(hf_tokenizer, "hf_tokenizer", lambda encoding: Full())
    source = save(toy_model(n_kv_head=2, vocab_size=257), tmp_path / "from", "byte")
    arguments = command("to_hf", out_dir=source, hf_dir=tmp_path / "new/hf")  # new is not left behind either
    assert "No space left on device" in fails(convert.main, arguments, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_a_folder_saved_by_transformers_5_is_read_with_version_4(folder, tmp_path, monkeypatch):
    """Version 4 lacks rope_parameters: it is given rope_theta and rope_scaling."""
    import transformers

    config = GPTConfig(rope_theta=5e4, rope_factor=8.0, rope_original_block_size=16)
    saved = dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e4))
    monkeypatch.setattr(transformers, "__version__", "4.56.2")
    assert convert.rope_for_version_4(saved, config)["rope_theta"] == 5e4
    assert convert.rope_for_version_4(saved, config)["rope_scaling"]["factor"] == 8.0
    assert convert.rope_for_version_4(dict(rope_theta=5e4), config) == {}
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    assert convert.rope_for_version_4(saved, config) == {}
