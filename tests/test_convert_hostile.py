"""from_hf and folders of Hugging Face with one value changed: 0, or 2 with one line, nothing left."""
import itertools
import json
import os
import random
import shutil
import time

import pytest
from test_convert import TINY, command, make_hf, sentencepiece_like

import convert

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
    "quantization_config": None,
    "auto_map": None,
    "tokenizer_class": None,
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
    auto_map=None,
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
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(MORE_KEYS | config))
    (path / "generation_config.json").write_text(json.dumps(SPECIAL))
    (path / "tokenizer_config.json").write_text(json.dumps(ABOUT))
    return path


def cases(folder, name, n):
    """n of the mutations of a file, and the content of each."""
    content = json.loads((folder / name).read_text())
    every = list(itertools.product(paths_in(content), range(len(VALUES))))
    random.Random(7).shuffle(every)
    for path, i in every[:n]:
        yield path, VALUES[i], changed(content, path, VALUES[i])


@pytest.mark.parametrize(
    "name,n",
    [
        ("config.json", 110),
        ("tokenizer.json", 60),
        ("tokenizer_config.json", 25),
        ("generation_config.json", 15),
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
        case = (name, path, str(value), code, error)
        assert time.monotonic() - began < 20, case
        assert "Traceback" not in error and "panicked" not in error, case
        assert code in (0, 2) and (code == 0) == (ours / "ckpt.pt").exists(), case
        if code == 2:
            assert error.count("\n") == 1 and "\n" not in error.strip(), case
        shutil.rmtree(ours, ignore_errors=True)
        shutil.rmtree(hf)
        assert not list(tmp_path.iterdir()), case
