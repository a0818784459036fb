"""Reads exported models with llama.cpp: the greedy ids, and the time of a decode step beside ours.

    pip install transformers safetensors llama-cpp-python gguf sentencepiece
    python results/against_llama_cpp.py LLAMA_CPP

LLAMA_CPP is the folder of llama.cpp's source, for its convert_hf_to_gguf.py. float32 on the CPU,
the KV cache too, random weights. Writes results/against_llama_cpp.md.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bench
import convert
from model import GPT, GPTConfig
from nanogqa.runtime import cpu_name, pick_runtime
from nanogqa.tokenizer import get_tokenizer
from sample import generate

ROUNDS = 8
PROMPT = "def f(x):\n    return x**2  # it's 2026\n\n\nprint(f(12345))  "
NEW_TOKENS = 32
SMALL = dict(n_layer=3, n_head=8, n_kv_head=2, n_embd=256, vocab_size=50304, qk_norm=False)
ARCHITECTURES = {
    "Llama": {},
    "Llama 3.1's RoPE": dict(rope_factor=8.0, rope_original_block_size=32, rope_theta=5e5),
    "Qwen2": dict(qkv_bias=True),
    "Qwen3": dict(qk_norm=True),
    "DeepSeek-V3": dict(attention="mla", n_kv_head=None, q_lora_rank=96, qk_norm=True),
}
LARGE = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, qk_norm=False)
KV_HEADS = (12, 4, 1)
PROMPT_LEN = 64
RUNS, STEPS = 6, 4  # in a round: short runs, since other programs disturb long ones


# -- an export in llama.cpp ------------------------------------------------------------------------

def random_model(settings):
    """A model whose greedy text depends on every weight: larger ones than before training."""
    model = GPT(GPTConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(5)
    return model


def to_gguf(model, folder, llama_cpp, tokenizer="gpt2"):
    """The path of a model file of llama.cpp, made of the folder that to_hf writes."""
    source = folder / "run"
    source.mkdir(parents=True)
    state = {"model": model.state_dict(), "config": vars(model.config), "tokenizer": tokenizer}
    convert.write_checkpoint(source, state)
    convert.main(["to_hf", f"--out_dir={source}", f"--hf_dir={folder / 'hf'}"])
    path = folder / "model.gguf"
    script = Path(llama_cpp) / "convert_hf_to_gguf.py"
    subprocess.run([sys.executable, script, folder / "hf", "--outtype", "f32", "--outfile", path],
                   check=True, capture_output=True)
    return path


def load(path, threads):
    """The model file in llama.cpp, all in float32 on the CPU."""
    import llama_cpp
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=threads, n_threads_batch=threads,
                           type_k=float32, type_v=float32, n_gpu_layers=0, verbose=False)


def next_logits(llama, ids):
    """Reads ids after those before; the logits of the next token."""
    import llama_cpp
    llama.eval(ids)
    row = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return torch.tensor(row[:llama.n_vocab()])


def their_greedy(llama, prompt, n):
    """The ids of a prompt, and the n greedy ids after it."""
    ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    llama.reset()
    new = []
    logits = next_logits(llama, ids)
    for _ in range(n):
        new.append(logits.argmax().item())
        logits = next_logits(llama, new[-1:])
    return ids, new


def our_greedy(model, prompt, n):
    ids = get_tokenizer("gpt2").encode(prompt, allowed_special="all")
    new = []
    for _, token in generate(model, [ids], n, temperature=0.0):
        new += token
    return ids, new


# -- times -----------------------------------------------------------------------------------------

def their_step(llama):
    """Milliseconds of a decode step: the median of a run, the minimum of the runs."""
    medians = []
    for _ in range(RUNS):
        llama.reset()
        llama.eval(list(range(100, 100 + PROMPT_LEN)))
        seconds = []
        for token in range(STEPS):
            start = time.perf_counter()
            next_logits(llama, [token])
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
    return min(medians) * 1e3


def our_step(settings):
    """The same of this model."""
    config = bench.BenchConfig(
        mode="decode", device="cpu", dtype="float32", batch_size=1, prompt_len=PROMPT_LEN,
        new_tokens=STEPS, repeats=RUNS, **settings)
    return bench.decode(config, pick_runtime("cpu", "float32", False), None)["step_ms"]


def time_in_turns(settings, folder, llama_cpp):
    """Milliseconds of a decode step in llama.cpp and here: minima over the rounds."""
    path = to_gguf(GPT(GPTConfig(**settings)).eval(), folder, llama_cpp)
    llama = load(path, torch.get_num_threads())
    theirs, ours = [], []
    for _ in range(ROUNDS):
        theirs.append(their_step(llama))
        ours.append(our_step(settings))
    return min(theirs), min(ours)


# -- the report ------------------------------------------------------------------------------------

def machine():
    busy, cores = os.getloadavg()[0], os.cpu_count()
    return (f"{date.today()}, {cpu_name()}, {cores} cores, "
            f"OMP_NUM_THREADS={torch.get_num_threads()}, load "
            f"{busy:.1f} at the end, torch {torch.__version__}")


def main(llama_cpp):
    import llama_cpp as package
    lines = ["# Exported models in llama.cpp", ""]
    lines += ["| | the prompt's ids are equal | greedy ids that are equal |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, changes) in enumerate(ARCHITECTURES.items()):
            model = random_model(SMALL | changes)
            llama = load(to_gguf(model, Path(folder) / f"small{i}", llama_cpp), 1)
            theirs = their_greedy(llama, PROMPT, NEW_TOKENS)
            ours = our_greedy(model, PROMPT, NEW_TOKENS)
            equal = sum(a == b for a, b in zip(theirs[1], ours[1], strict=True))
            lines.append(f"| {name} | {theirs[0] == ours[0]} | {equal} of {NEW_TOKENS} |")
        lines += ["", "| n_kv_head | llama.cpp | here | ratio |", "|---|---|---|---|"]
        for n_kv_head in KV_HEADS:
            settings = LARGE | dict(n_kv_head=n_kv_head)
            theirs, ours = time_in_turns(settings, Path(folder) / f"large{n_kv_head}", llama_cpp)
            lines.append(f"| {n_kv_head} | {theirs:.1f} ms | {ours:.1f} ms | {ours / theirs:.2f} |")
    lines += [
        "",
        f"Written by `python results/against_llama_cpp.py LLAMA_CPP`: {machine()}, "
        f"llama-cpp-python {package.__version__} built from source.",
        "",
        f"The first table: {NEW_TOKENS} greedy tokens of random models after a prompt. The second: "
        f"milliseconds of a decode step, 12 layers of width 768, vocabulary 50,304, batch 1, "
        f"{PROMPT_LEN} tokens of context; medians of {STEPS} steps, minima of {ROUNDS} rounds of "
        f"{RUNS} runs in turns. float32 weights and KV cache.",
        "",
    ]
    text = "\n".join(lines)
    (ROOT / "results" / "against_llama_cpp.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python results/against_llama_cpp.py LLAMA_CPP")
    main(sys.argv[1])
