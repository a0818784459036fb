"""An exported model in llama.cpp. Set LLAMA_CPP to the folder of llama.cpp's source to run it."""
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from conftest import toy_model

from nanogqa.configurator import UserError
from nanogqa.tokenizer import get_tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "results" / "against_llama_cpp.py"


@pytest.fixture
def script():
    for name in ("llama_cpp", "transformers", "gguf", "sentencepiece"):
        pytest.importorskip(name)
    try:
        get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no folder with convert_hf_to_gguf.py")
    spec = importlib.util.spec_from_file_location("against_llama_cpp", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "changes",
    [{}, dict(qkv_bias=True), dict(qk_norm=True)],
    ids=["llama", "qwen2", "qwen3"],
)
def test_llama_cpp_gives_the_greedy_ids(script, tmp_path, changes):
    settings = dict(n_kv_head=2, n_embd=256, vocab_size=50304, qk_norm=False) | changes
    model = toy_model(**settings)
    llama = script.load(script.to_gguf(model, tmp_path, os.environ["LLAMA_CPP"]), 1)
    for prompt in (script.PROMPT, "it's 漢字 🙂\n\n<|endoftext|>then  "):
        theirs = script.their_greedy(llama, prompt, 10)
        assert theirs == script.our_greedy(model, prompt, 10)
