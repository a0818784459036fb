"""Makes GQA and MQA of trained MHA checkpoints, and trains them on for 5 and 10 % of the original steps.

    python results/uptraining.py [SEED ...]        1337 1338 1339 unless named

After figure 5 of Ainslie et al. 2023 (arXiv 2305.13245), at the size of the default model. Runs go to out/uptraining, what is
there is not run again; the table goes to results/uptraining.md. About 20 minutes a seed on two CPU cores.
"""
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT, STEPS = ROOT / "out/uptraining", 3200
# name -> (method of convert.py pool and its settings, settings of train.py)
WAYS = {"mean": (["--method=mean"], ["--learning_rate=1e-3"]),
        "aligned": (["--dataset=python"], ["--learning_rate=1e-3"]),
        "aligned, queries and keys trained": (["--dataset=python"], ["--learning_rate=2e-3", "--trainable=q_proj|k_proj"])}


def val_loss(folder, *settings):
    """The last validation loss of the run in folder, which is trained if it is not there."""
    if not (OUT / folder / "done").exists():
        run("train.py", f"--out_dir={OUT / folder}", "--eval_interval=100000", "--overwrite=True", *settings)
        (OUT / folder / "done").touch()
    return json.loads((OUT / folder / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]


def run(program, *args):
    print(program, *args, flush=True)
    subprocess.run([sys.executable, ROOT / program, *args], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def measure(seed):
    """{(kind of heads, way): {percent of the steps: validation loss}} of one seed."""
    def scratch(kv):
        return {100: val_loss(f"{seed}/scratch{kv}", "--qk_norm=False", f"--n_kv_head={kv}", f"--seed={seed}", f"--max_steps={STEPS}")}
    losses = {("MHA", "from scratch"): scratch(4)}
    more = {percent: val_loss(f"{seed}/mha+{percent}", f"--init_from={OUT}/{seed}/scratch4", f"--seed={seed}", "--learning_rate=1e-3",
                              "--warmup_steps=8", f"--max_steps={STEPS * percent // 100}") for percent in (5, 10)}
    losses["MHA", "trained on likewise"] = more
    for kv, kind in ((2, "GQA, 2 heads"), (1, "MQA")):
        for way, (pooling, training) in WAYS.items():
            name = f"{seed}/{kv}-{way.replace(', ', '-').replace(' ', '-')}"
            if not (OUT / name).exists():
                run("convert.py", "pool", f"--out_dir={OUT}/{seed}/scratch4", f"--new_dir={OUT / name}", f"--n_kv_head={kv}", *pooling)
            losses[kind, way] = {percent: val_loss(f"{name}+{percent}", f"--init_from={OUT / name}", f"--seed={seed}", "--warmup_steps=8",
                                                   f"--max_steps={STEPS * percent // 100}", *training) for percent in (0, 5, 10)}
    for kv, kind in ((2, "GQA, 2 heads"), (1, "MQA")):
        losses[kind, "from scratch"] = scratch(kv)
    return losses


def report(runs):
    table = ["| validation loss, nats per byte: mean of the seeds ± standard error | 0 % | 5 % | 10 % | 100 % | seeds |",
             "|---|---|---|---|---|---|"]
    for key in dict.fromkeys(key for losses in runs for key in losses):
        cells, having = [], [losses[key] for losses in runs if key in losses]
        for percent in (0, 5, 10, 100):
            x = [losses[percent] for losses in having if percent in losses]
            error = f" ± {statistics.stdev(x) / len(x) ** 0.5:.3f}" if len(x) > 1 else ""
            cells.append(f"{statistics.mean(x):.3f}{error}" if x else "")
        table.append(f"| {', '.join(key)} | {' | '.join(cells)} | {len(having)} |")
    gaps = [losses["GQA, 2 heads", "aligned, queries and keys trained"][5] - losses["MHA", "from scratch"][100] for losses in runs]
    table += ["", f"GQA, aligned, queries and keys trained for 5 % of the steps, less MHA: {', '.join(f'{gap:+.4f}' for gap in gaps)} nats."]
    (ROOT / "results/uptraining.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    report([measure(int(seed)) for seed in sys.argv[1:] or (1337, 1338, 1339)])
