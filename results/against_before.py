"""Times this tree, its plain model (--fast=False) and another checkout of the repository, in turns.

    python results/against_before.py TREE [--rounds=4]

Every timing is a bench.py in a process of its own. The minimum over the rounds counts, since a
shared machine only ever adds time. Writes results/against_before.md.
"""
import datetime
import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanogqa.configurator import build, parse

ROOT = Path(__file__).resolve().parents[1]
LARGE = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--n_ff=2048", "--vocab_size=50304",
         "--qk_norm=False", "--new_tokens=16", "--prefill=False"]


@dataclass
class Config:
    rounds: int = 4  # timings of each cell


@dataclass
class Cell:
    """One shape, and the milliseconds of its steps in each tree."""
    name: str
    flags: list
    before: list = field(default_factory=list)
    now: list = field(default_factory=list)
    plain: list = field(default_factory=list)


def train_cell(name, n_embd, n_layer, batch_size, block_size, vocab_size):
    flags = ["--mode=train", f"--n_embd={n_embd}", f"--n_layer={n_layer}", "--n_kv_head=2",
             f"--batch_size={batch_size}", f"--block_size={block_size}",
             f"--vocab_size={vocab_size}", "--steps=4"]
    if n_embd == 128:
        flags[-1] = "--steps=60"
    return Cell(f"train, {name}", flags)


def decode_cell(batch_size, prompt_len, n_kv_head):
    flags = ["--mode=decode", *LARGE, f"--batch_size={batch_size}", f"--prompt_len={prompt_len}",
             f"--n_kv_head={n_kv_head}"]
    name = f"decode, 12 x 768, batch {batch_size}, {prompt_len:,} tokens, {n_kv_head} heads"
    return Cell(name, flags)


def cells():
    return [
        train_cell("4 x 128, 12 x 64 tokens", 128, 4, 12, 64, 257),
        train_cell("6 x 384, 16 x 256 tokens", 384, 6, 16, 256, 256),
        train_cell("4 x 256, 50,304 ids, 8 x 256 tokens", 256, 4, 8, 256, 50304),
        decode_cell(1, 64, 4),
        decode_cell(8, 64, 4),
        decode_cell(8, 1024, 12),
        decode_cell(8, 1024, 4),
        decode_cell(8, 1024, 1),
        Cell("decode, default model, MLA, batch 16, 1,024 tokens",
             ["--mode=decode", "--attention=mla", "--batch_size=16", "--prompt_len=1024"]),
    ]


def step_ms(tree, flags):
    command = [sys.executable, "bench.py", "--device=cpu", "--dtype=float32", "--compile=False"]
    done = subprocess.run([*command, *flags], cwd=tree, capture_output=True, encoding="utf-8",
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])["step_ms"]


def table(measured, rounds):
    lines = [
        "# This tree beside the one before, and beside its plain model",
        "",
        f"Written by `python results/against_before.py TREE --rounds={rounds}`: milliseconds per "
        "step, the minimum over the rounds, measured in turns. Ratios are to the tree before. "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"float32, eager, {datetime.date.today().isoformat()}.",
        "",
        "| step | before | now | ratio | `--fast=False` | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for cell in measured:
        before, now, plain = min(cell.before), min(cell.now), min(cell.plain)
        lines.append(f"| {cell.name} | {before:.2f} | {now:.2f} | {now / before:.2f} | "
                     f"{plain:.2f} | {plain / before:.2f} |")
    return "\n".join(lines) + "\n"


def main():
    tree = Path(sys.argv[1])
    config = build(Config, parse(Config, sys.argv[2:], __doc__))
    measured = cells()
    for number in range(config.rounds):
        for cell in measured:
            cell.before.append(step_ms(tree, cell.flags))
            cell.now.append(step_ms(ROOT, cell.flags))
            cell.plain.append(step_ms(ROOT, [*cell.flags, "--fast=False"]))
            print(f"round {number + 1}: {cell.name}: {cell.before[-1]:.2f} before, "
                  f"{cell.now[-1]:.2f} now, {cell.plain[-1]:.2f} plain", flush=True)
        text = table(measured, number + 1)
        (ROOT / "results" / "against_before.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
