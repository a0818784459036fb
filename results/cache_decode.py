"""Times a decoding step of the designs of config/cache.py over a large cache.

    python results/cache_decode.py

The shape is that of 12 query heads of width 64, 12 layers, with a small vocabulary, so that reading
the cache is most of a step: 16 texts of 4,096 tokens. bench.py times each design in a process of
its own, in two rounds, and the faster round counts. Writes results/cache_decode.md.
"""
import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from compare import CompareConfig
from nanogqa.configurator import parse
from nanogqa.runtime import cpu_name
from train import TrainConfig

DESIGNS = parse(CompareConfig, [str(ROOT / "config" / "cache.py")], "", axes=True)["design"]
SHAPE = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--batch_size=16", "--prompt_len=4096",
         "--prefill=False", "--new_tokens=6", "--repeats=2", "--compile=False", "--dtype=float32"]
ROUNDS = 2
RESULTS = Path(__file__).with_suffix(".md")


def timed(design):
    """A row of bench.py."""
    flags = []
    for key, value in parse(TrainConfig, [str(ROOT / "config" / f"{design}.py")], "").items():
        if key != "out_dir":
            flags.append(f"--{key}={value}")
    command = [sys.executable, ROOT / "bench.py", "--mode=decode", *SHAPE, *flags]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1])


def step_ms(row):
    return row["step_ms"]


def main():
    rows = {}
    for _ in range(ROUNDS):
        for design in DESIGNS:
            row = timed(design)
            print(design, row["step_ms"], flush=True)
            rows[design] = min(rows.get(design, row), row, key=step_ms)
    first = rows[DESIGNS[0]]
    lines = [
        "# A decoding step with smaller caches",
        "",
        f"Written by `python results/cache_decode.py`: 12 layers of 12 heads of width 64, 16 texts "
        f"of 4,096 tokens, float32, random weights and caches. {cpu_name()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}.",
        "",
        "| design | cache, MB | read by a step, MB | ms per step | of mha |",
        "|---|---|---|---|---|",
    ]
    for design, row in rows.items():
        cells = [design, f"{row['kv_cache_bytes'] / 1e6:,.0f}",
                 f"{row['bytes_per_step'] / 1e6:,.0f}", f"{row['step_ms']:.0f}",
                 f"{row['step_ms'] / first['step_ms']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
