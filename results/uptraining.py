"""Converts trained MHA checkpoints to GQA and MQA, and trains them for 5 and 10 % more steps.

    python results/uptraining.py [SEED ...]        default: 1337 1338 1339

Follows figure 5 of Ainslie et al. 2023 (arXiv 2305.13245) at the size of the default model. Runs go
to out/uptraining; finished ones are not repeated. The table goes to results/uptraining.md. Takes
about 20 minutes per seed on two CPU cores.
"""
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanogqa.log import read_rows

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out/uptraining"
STEPS = 3200
PERCENTS = (0, 5, 10, 100)  # of STEPS, the columns of the table
VARIANTS = {2: "GQA, 2 heads", 1: "MQA"}  # n_kv_head -> name
BEST = "aligned, queries and keys trained"


@dataclass
class Way:
    """How to pool an MHA model, and how to train the result."""
    name: str
    pooling: list                 # settings of convert.py pool
    training: list                # settings of train.py

    @property
    def folder(self):
        return self.name.replace(", ", "-").replace(" ", "-")


WAYS = (
    Way("mean", ["--method=mean"], ["--learning_rate=1e-3"]),
    Way("aligned", ["--dataset=python"], ["--learning_rate=1e-3"]),
    Way(BEST, ["--dataset=python"], ["--learning_rate=2e-3", "--trainable=q_proj|k_proj"]),
)


# -- runs ------------------------------------------------------------------------------------------

def run(program, *args):
    print(program, *args, flush=True)
    command = [sys.executable, ROOT / program, *args]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def val_loss(folder, *settings):
    """The last validation loss of the run in folder. Trains the run first if it is not finished."""
    done = OUT / folder / "done"
    if not done.exists():
        run("train.py", f"--out_dir={OUT / folder}", "--eval_interval=100000", "--overwrite=True",
            *settings)
        done.touch()
    return read_rows(OUT / folder / "metrics.jsonl")[-1]["val_loss"]


def from_scratch(seed, n_kv_head):
    """{100: validation loss} of a model with n_kv_head key/value heads, trained for all STEPS."""
    loss = val_loss(f"{seed}/scratch{n_kv_head}", "--qk_norm=False", f"--n_kv_head={n_kv_head}",
                    f"--seed={seed}", f"--max_steps={STEPS}")
    return {100: loss}


def continued(seed, source, name, percents, training):
    """{percent: validation loss} of the checkpoint in source after percent % of STEPS more."""
    losses = {}
    for percent in percents:
        losses[percent] = val_loss(
            f"{seed}/{name}+{percent}", f"--init_from={OUT}/{seed}/{source}", f"--seed={seed}",
            "--warmup_steps=8", f"--max_steps={STEPS * percent // 100}", *training)
    return losses


def pooled(seed, n_kv_head, way):
    """{percent: validation loss} of the MHA model pooled to n_kv_head heads, then trained."""
    name = f"{n_kv_head}-{way.folder}"
    new_dir = OUT / f"{seed}/{name}"
    if not new_dir.exists():
        run("convert.py", "pool", f"--out_dir={OUT}/{seed}/scratch4", f"--new_dir={new_dir}",
            f"--n_kv_head={n_kv_head}", *way.pooling)
    return continued(seed, name, name, (0, 5, 10), way.training)


def measure(seed):
    """{(variant, way): {percent of STEPS: validation loss}} of one seed, in the table's order."""
    losses = {}
    losses["MHA", "from scratch"] = from_scratch(seed, 4)
    losses["MHA", "trained further"] = continued(
        seed, "scratch4", "mha", (5, 10), ["--learning_rate=1e-3"])
    for n_kv_head, variant in VARIANTS.items():
        for way in WAYS:
            losses[variant, way.name] = pooled(seed, n_kv_head, way)
    for n_kv_head, variant in VARIANTS.items():
        losses[variant, "from scratch"] = from_scratch(seed, n_kv_head)
    return losses


# -- table -----------------------------------------------------------------------------------------

def mean_and_error(losses):
    """Mean ± standard error as text; "" without losses, no error for a single one."""
    if not losses:
        return ""
    mean = f"{statistics.mean(losses):.3f}"
    if len(losses) == 1:
        return mean
    error = statistics.stdev(losses) / len(losses) ** 0.5
    return f"{mean} ± {error:.3f}"


def table_row(key, runs):
    """The row of one (variant, way). runs holds what measure returned for each seed."""
    measured = [losses[key] for losses in runs if key in losses]
    cells = [", ".join(key)]
    for percent in PERCENTS:
        cells.append(mean_and_error([row[percent] for row in measured if percent in row]))
    cells.append(str(len(measured)))
    return f"| {' | '.join(cells)} |"


def keys_of(runs):
    """The (variant, way) pairs of all runs, each once."""
    keys = []
    for losses in runs:
        for key in losses:
            if key not in keys:
                keys.append(key)
    return keys


def gap(losses):
    """Loss of the best GQA model after 5 % of STEPS, minus that of MHA, in nats. For one seed."""
    return losses["GQA, 2 heads", BEST][5] - losses["MHA", "from scratch"][100]


def report(runs):
    head = "validation loss, nats per byte: mean of the seeds ± standard error"
    table = [f"| {head} | 0 % | 5 % | 10 % | 100 % | seeds |", "|---|---|---|---|---|---|"]
    for key in keys_of(runs):
        table.append(table_row(key, runs))
    gaps = ", ".join(f"{gap(losses):+.4f}" for losses in runs)
    table.append("")
    table.append(f"GQA, {BEST} for 5 % of the steps, minus MHA: {gaps} nats.")
    text = "\n".join(table) + "\n"
    (ROOT / "results/uptraining.md").write_text(text, encoding="utf-8")
    print(text, end="")


def main():
    seeds = [1337, 1338, 1339]
    if len(sys.argv) > 1:
        seeds = [int(seed) for seed in sys.argv[1:]]
    report([measure(seed) for seed in seeds])


if __name__ == "__main__":
    main()
