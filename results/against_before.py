"""Times this tree, its plain model (--fast=False) and another checkout of the repository, in turns.

    python results/against_before.py --tree=FOLDER [--rounds=4]

Every timing is a bench.py in a process of its own, or the whole time of a program that starts. The
minimum over the rounds counts, since a shared machine only ever adds time. Writes
results/against_before.md.
"""
import datetime
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanogqa.configurator import UserError, build, parse, program
from nanogqa.runtime import cpu_name

ROOT = Path(__file__).resolve().parents[1]
LARGE = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--n_ff=2048", "--vocab_size=50304",
         "--qk_norm=False", "--new_tokens=16", "--prefill=False"]


@dataclass
class Config:
    tree: str | None = None  # the other checkout
    rounds: int = 4  # timings of each cell


@dataclass
class Cell:
    """One shape, and the milliseconds of its steps in each tree."""
    name: str
    flags: list
    key: str = "step_ms"  # of bench.py's row: step_ms or prefill_s; start: flags are a command
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


def decode_cell(batch_size, prompt_len, n_kv_head, dtype="float32"):
    flags = ["--mode=decode", *LARGE, f"--batch_size={batch_size}", f"--prompt_len={prompt_len}",
             f"--n_kv_head={n_kv_head}", f"--dtype={dtype}"]
    name = f"decode, 12 x 768, batch {batch_size}, {prompt_len:,} tokens, {n_kv_head} heads"
    if dtype != "float32":
        name += f", {dtype}"
    return Cell(name, flags)


def prefill_cell(name, flags):
    flags = ["--mode=decode", "--new_tokens=2", "--repeats=1", *flags]
    return Cell(f"prompt, {name}", flags, "prefill_s")


def prefill_cells():
    """Prompts of MHA, GQA, MQA and MLA in two shapes."""
    found = []
    for name in ("--n_kv_head=4", "--n_kv_head=2", "--n_kv_head=1", "--attention=mla"):
        found.append(prefill_cell(f"default model, 1 x 4,096 tokens, {name}",
                                  ["--prompt_len=4096", name]))
    for name in ("--n_kv_head=16", "--n_kv_head=4", "--n_kv_head=1", "--attention=mla"):
        flags = ["--n_layer=1", "--n_head=16", "--n_embd=1024", "--batch_size=16"]
        found.append(prefill_cell(f"1 x 1024, 16 x 4,096 tokens, {name}",
                                  [*flags, "--prompt_len=4096", name]))
    return found


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
        decode_cell(1, 64, 4, "bfloat16"),
        decode_cell(8, 64, 4, "bfloat16"),
        *prefill_cells(),
        Cell("import torch", ["-c", "import torch"], "start"),
        Cell("train.py --help", ["train.py", "--help"], "start"),
        Cell("sample.py --help", ["sample.py", "--help"], "start"),
    ]


def milliseconds(tree, cell, *more):
    if cell.key == "start":
        return start_ms(tree, cell.flags)
    command = [sys.executable, "bench.py", "--device=cpu", "--dtype=float32", "--compile=False"]
    done = subprocess.run([*command, *cell.flags, *more], cwd=tree, capture_output=True,
                          encoding="utf-8", check=True)
    value = json.loads(done.stdout.splitlines()[-1])[cell.key]
    if cell.key == "prefill_s":
        value *= 1e3
    return value


def start_ms(tree, arguments):
    """Milliseconds that a Python process takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=tree, capture_output=True, check=True)
    return (time.perf_counter() - start) * 1e3


def table(measured, rounds):
    lines = [
        "# This tree beside the one before, and beside its plain model",
        "",
        f"Written by `python results/against_before.py --tree=FOLDER --rounds={rounds}`: "
        "milliseconds per step, for a prompt or for a whole process, the minimum over the rounds, "
        "measured in turns. Ratios are to the tree before. "
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"float32 unless a row says otherwise, eager, {datetime.date.today().isoformat()}.",
        "",
        "| what | before | now | ratio | `--fast=False` | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for cell in measured:
        before, now = min(cell.before), min(cell.now)
        line = f"| {cell.name} | {before:.2f} | {now:.2f} | {now / before:.2f} | "
        if cell.plain:
            line += f"{min(cell.plain):.2f} | {min(cell.plain) / before:.2f} |"
        else:
            line += "| |"
        lines.append(line)
    return "\n".join(lines) + "\n"


@program
def main(argv):
    config = build(Config, parse(Config, argv, __doc__))
    tree = Path(config.tree or "")
    if config.tree is None or not (tree / "bench.py").exists():
        raise UserError("there is no tree to compare with: name a checkout of the repository with "
                        "--tree=FOLDER")
    measured = cells()
    for number in range(config.rounds):
        for cell in measured:
            cell.before.append(milliseconds(tree, cell))
            cell.now.append(milliseconds(ROOT, cell))
            if cell.key == "step_ms":
                cell.plain.append(milliseconds(ROOT, cell, "--fast=False"))
            print(f"round {number + 1}: {cell.name}: {cell.before[-1]:.2f} before, "
                  f"{cell.now[-1]:.2f} now", flush=True)
        text = table(measured, number + 1)
        (ROOT / "results" / "against_before.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
