"""Compares the greedy text of a run's model in float32 and in bfloat16, on a CPU.

    python results/bfloat16_text.py [--out_dir=out/gqa]

Says, for several prompts, whether the first 64 tokens are equal. Where they differ: the position,
by how much float32 prefers its token to the second most likely one, and the spacing of bfloat16
numbers of that size, by which rounding may change any logit. Writes results/bfloat16_text.md.
"""
import datetime
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from nanogqa import checkpoint, folder
from nanogqa.configurator import build, parse, program
from nanogqa.fast import prepare_for_decoding
from nanogqa.runtime import cpu_name
from nanogqa.tokenizer import get_tokenizer
from sample import generate

PROMPTS = ("def ", "import ", "class ", "# ", "    return ", "for i in ", "from ", "if __name__")
TOKENS = 64
RESULTS = Path(__file__).with_suffix(".md")


@dataclass
class Config:
    out_dir: str = "out/gqa"  # folder of a run


def load_model(state, dtype):
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state)
    return prepare_for_decoding(model.to(dtype).eval(), 1)


def greedy(model, ids):
    return [new[0] for _, new in generate(model, [ids], TOKENS, temperature=0)]


@torch.inference_mode()
def compare(model, other_model, ids):
    """A line on the texts that a model and its copy in bfloat16 continue ids with."""
    expected, other = greedy(model, ids), greedy(other_model, ids)
    if expected == other:
        return f"{TOKENS} tokens are equal"
    length = 0
    while expected[length] == other[length]:
        length += 1
    logits = model(torch.tensor([ids + expected[:length]]), logits="last")[0]
    first, second = logits.flatten().topk(2).values.tolist()
    spacing = torch.finfo(torch.bfloat16).eps * 2.0 ** math.floor(math.log2(abs(first)))
    return (f"{length} tokens are equal, then float32 prefers its token by {first - second:.4f}; "
            f"bfloat16 numbers of that size are {spacing:.4f} apart")


@program
def main(argv):
    config = build(Config, parse(Config, argv, __doc__))
    state = checkpoint.load(config.out_dir, GPTConfig)
    encoding = get_tokenizer(state["tokenizer"], folder.path_of(config.out_dir).parent)
    model, other_model = load_model(state, torch.float32), load_model(state, torch.bfloat16)
    lines = [
        "# Greedy text in float32 and in bfloat16",
        "",
        "Written by `python results/bfloat16_text.py`: the model of the first command of README.md "
        f"continues prompts by {TOKENS} tokens. {cpu_name()}, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}.",
        "",
    ]
    for prompt in PROMPTS:
        lines.append(f"- `{prompt!r}`: {compare(model, other_model, encoding.encode(prompt))}")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
