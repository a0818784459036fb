"""Trains one model as MHA, GQA and MQA, several seeds each, and reports quality, cache and speed with error bars.

    python compare.py                                        the built-in comparison, which prints how long it will take
    python compare.py config/gpt2_124m.py --dataset=PATH --n_kv_head=12,4,2,1 --seeds=3
    python compare.py --attention=gqa,mla                    with multi-head latent attention as a fourth
    python compare.py --n_head=1,2,4,8 --match=shape         any key with a list is an axis

Every key of train.py passes through. out_dir receives the runs, results.json, report.md and, with matplotlib, pictures.
The same command goes on where a killed one stopped.
"""
import datetime
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from nanogqa import checkpoint
from bench import choices_of, heads_of
from nanogqa.configurator import UserError, build, parse, program, subset, world
from nanogqa.dataloader import Dataset, bits_per_byte, prepare_default
from nanogqa.files import check_writable, write_json
from model import GPT, LATENT, GPTConfig
from train import TrainConfig, pick_runtime

PUBLISHED = (0.008, 0.04)  # nats between MHA, GQA and MQA in papers, near 124 million parameters


@dataclass
class CompareConfig(TrainConfig):
    out_dir: str = "out/compare"  # folder that receives runs, results and report
    max_steps: int = 800          # optimizer steps of each run
    eval_interval: int = 100      # steps between evaluations
    seeds: int = 3                # runs of each variant, of seed, seed + 1 and so on
    match: Literal["both", "shape", "params"] = "both"  # hold equal all but the axes, or the parameters too, by n_ff
    controls: bool = False        # also fewer heads, and thinner heads, of the same cache (Shazeer 2019)
    decode_batch_size: int | None = None  # rows to time decoding with; a list makes a table; None: 1,16
    decode_prompt_len: int | None = None  # contexts to time decoding at, likewise; None: 256,1024,4096
    report_only: bool = False     # make the report from results.json again

    def __post_init__(self):
        super().__post_init__()
        for name in ("seeds", "max_steps", "decode_batch_size", "decode_prompt_len"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.init_from != "scratch" or self.eval_only:
            raise ValueError("a comparison trains from scratch: leave out init_from and eval_only")


# what every run of a comparison shares, so that a list would have no meaning; and what says nothing about its results
SHARED = {"out_dir", "seeds", "seed", "match", "controls", "dataset", "vocab_size", "block_size", "max_steps", "eval_interval",
          "eval_tokens", "device", "dtype", "compile", "report_only", "overwrite"}
ASIDE = {"out_dir", "report_only", "overwrite", "log_interval", "profile", "keep_checkpoints", "wandb_log", "wandb_project",
         "wandb_run_name"}


# -- the plan ----------------------------------------------------------------------------------------------------------

@dataclass
class Variant:
    name: str                     # MHA, GQA-2, MQA, or the values that it has on other axes
    match: str                    # shape or params: what it shares with the first variant
    config: TrainConfig           # complete, but for the seed
    facts: dict                   # what the shape alone decides

    @property
    def shape(self):
        return f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', self.name)}-n_ff{self.config.n_ff}"

    def run(self, seed):
        """The folder of a run: variants that are one model in both matchings share theirs."""
        return f"{self.shape}-seed{seed}"


def attention_name(config):
    kv, H = config.n_kv_head, config.n_head
    return "MLA" if config.attention == "mla" else "MHA" if kv == H else "MQA" if kv == 1 else f"GQA-{kv}"


def plan(given):
    """(settings, variants) of the command line's values; the first variant is what the others are compared to."""
    if listed := [key for key in SHARED if isinstance(given.get(key), list)]:
        raise UserError(f"{listed[0]} takes one value in a comparison: every run shares it")
    base = build(CompareConfig, choices_of(given)[0])
    runtime = pick_runtime(base.device, base.dtype, base.compile)
    prepare_default(base.dataset, world()[2])
    keys = {f.name for f in fields(TrainConfig)}
    values = {key: given[key] for key in given if key in keys}
    values |= dict(max_steps=base.max_steps, eval_interval=base.eval_interval, out_dir="", overwrite=False,
                   vocab_size=base.vocab_size or Dataset(base.dataset).meta["vocab_size"])
    if isinstance(values.get("attention"), list):
        values = dict(attention=values["attention"]) | values           # all of one kind, then the other
    lists = {key for key in values if isinstance(values[key], list)}
    if (not lists and base.attention == "gqa") or ("attention" in lists <= {"attention", *LATENT} and "n_kv_head" not in values):
        values["n_kv_head"] = list({base.n_head: 0, max(1, base.n_head // 2): 0, 1: 0})
    if isinstance(values.get("n_kv_head"), list):
        values["n_kv_head"].sort(key=lambda n: n or sys.maxsize, reverse=True)  # MHA first
    axes = [key for key in values if isinstance(values[key], list) and key not in ("attention", "n_kv_head")]
    named = not axes or any(isinstance(values.get(key), list) for key in ("attention", "n_kv_head"))
    choices = []  # (name, settings)
    for chosen in choices_of(values):
        c = build(TrainConfig, chosen)
        names = [f"{key}={chosen[key]}" for key in axes if key in chosen]
        choices.append((" ".join([attention_name(c)] * named + names), chosen))
        if base.controls and c.n_kv_head < c.n_head:
            K, D = c.n_kv_head, c.head_dim
            thin = D * K // c.n_head
            controls = [(f"{K} head{'s' * (K > 1)}", dict(n_head=K, n_kv_head=K, head_dim=D))]
            controls += [(f"heads of {thin}", dict(n_kv_head=c.n_head, head_dim=thin))] if thin * c.n_head == D * K and thin % 2 == 0 else []
            choices += [(" ".join([name, *names]), chosen | changes) for name, changes in controls]
    variants = []
    for match in ("shape", "params") if base.match == "both" else (base.match,):
        wanted = None
        for name, chosen in choices:
            config = build(TrainConfig, chosen)
            model = checkpoint.new_model(GPT, subset(GPTConfig, config))
            wanted = wanted or model.num_params()
            if match == "params" and model.num_params() != wanted:
                config.n_ff = matching_n_ff(config, model.num_params(), wanted)
                model = checkpoint.new_model(GPT, subset(GPTConfig, config))
            variants.append(Variant(name, match, config, dict(
                heads=config.heads, n_head=config.n_head, head_dim=config.head_dim, n_ff=config.n_ff, **heads_of(config),
                params=model.num_params(), non_embedding_params=model.num_params(embedding=False),
                flops_per_token=model.flops_per_token(), kv_bytes_per_token=model.kv_bytes_per_token(runtime.dtype))))
    return base, runtime, variants


def matching_n_ff(config, params, wanted):
    """The n_ff that brings a model of params parameters to those wanted; a multiple of 8 where that keeps 0.5 %."""
    each = 3 * config.n_layer * config.n_embd  # parameters of one hidden unit: a row of gate and up, a column of down
    exact = config.n_ff + (wanted - params) / each
    if exact < 1:
        raise UserError(f"no n_ff brings {params:,} parameters to the {wanted:,} of the first variant: choose --match=shape")
    rounded = round(exact / 8) * 8
    return rounded if abs(rounded - exact) * each <= 0.005 * wanted and rounded else round(exact)


def identity(base, given, variants, dataset):
    """What a comparison is, as plain values: results of another one are not mixed with it."""
    settings = {key: value for key, value in asdict(base).items() if key not in ASIDE}
    settings |= {key: given.get(key) for key in ("decode_batch_size", "decode_prompt_len")}
    shapes = [dict(match=v.match, name=v.name, **asdict(subset(GPTConfig, v.config))) for v in variants]
    return json.loads(json.dumps(dict(settings=settings, variants=shapes, dataset_sha256=dataset.meta["sha256"],
                                      tokenizer=dataset.meta["tokenizer"])))


# -- running it ----------------------------------------------------------------------------------------------------------

def log_rows(folder):
    """The rows of a run's metrics.jsonl, without one that was cut short."""
    rows = []
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def steps_done(rows):
    return rows[-1]["step"] if rows else 0


def run_training(folder, config, seed, bar):
    """Trains one run by train.py, or goes on with it; under torchrun where there are several GPUs."""
    values = asdict(config) | dict(seed=seed, out_dir=folder, init_from="auto", log_interval=max(1, config.max_steps // 50))
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *launcher, Path(__file__).with_name("train.py"), *(f"--{key}={value}" for key, value in values.items())]
    folder.mkdir(parents=True, exist_ok=True)
    before, start, line = bar.n, steps_done(log_rows(folder)), ""
    with open(folder / "train.log", "a") as log, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout:
            log.write(line)
            if step := re.match(r"step +(\d+)", line):
                bar.update(max(0, before + int(step[1]) - start - bar.n))
    if process.returncode:
        raise UserError(f"training {folder.name} ended with code {process.returncode} ({line.strip()[:200]}): see "
                        f"{folder / 'train.log'}; the same command goes on from here")


def measure(variants, base, given):
    """{shape: dict(train=row, decode=[rows])} of bench.py, each shape in processes of its own, the best of two rounds in
    turns: the machine may be busy with something else for a while."""
    shapes, speed = {v.shape: asdict(subset(GPTConfig, v.config)) | dict(optimizer=v.config.optimizer) for v in variants}, {}
    grid = dict(batch_size=given["decode_batch_size"] if base.decode_batch_size else [1, 16],
                prompt_len=given["decode_prompt_len"] if base.decode_prompt_len else [256, 1024, 4096])
    batch_size = base.batch_size or base.tokens_per_step // base.block_size
    modes = dict(train=dict(batch_size=batch_size, steps=30, compile=base.compile),
                 decode=dict(grid, new_tokens=16, repeats=2, compile=False))
    for _, shape, mode in tqdm([(i, shape, mode) for i in range(2) for shape in shapes for mode in modes], desc="speed", disable=None):
        settings = dict(mode=mode, seed=base.seed, device=base.device, dtype=base.dtype) | shapes[shape] | modes[mode]
        flags = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in settings.items()]
        done = subprocess.run([sys.executable, Path(__file__).with_name("bench.py"), *flags], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"bench.py failed for {shape} ({done.stderr.strip().splitlines()[-1][:200]}): run it alone to see why")
        new = json.loads(done.stdout.splitlines()[-1])
        rows = speed.setdefault(shape, {}).setdefault(mode, [])
        for i, row in enumerate(new.get("rows", [new])):
            if i == len(rows):
                rows.append(row)
            elif row["step_ms"] < rows[i]["step_ms"]:
                rows[i] = row
    return speed


def describe_machine(runtime):
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
    return dict(cpu=cpu, threads=torch.get_num_threads(), gpu=gpu, gpus=torch.cuda.device_count(), torch=torch.__version__,
                python=platform.python_version(), system=platform.system(), **runtime.describe())


# -- what the numbers say ------------------------------------------------------------------------------------------------

def student_t(df, p=0.975):
    """The p quantile of Student's t with df degrees of freedom, by bisection of its distribution function in closed form
    (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    def two_sided(t):
        theta = math.atan(t / math.sqrt(df))
        term, total = (math.cos(theta), 0.0) if df % 2 else (1.0, 0.0)
        for k in range(3 if df % 2 else 2, df + 1, 2):
            total += term
            term *= math.cos(theta) ** 2 * (k - 1) / k
        if df % 2:
            return 2 / math.pi * (theta + math.sin(theta) * total)
        return math.sin(theta) * total
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle) < 2 * p - 1 else (low, middle)
    return low


def paired(values, reference):
    """(mean, half-width of the 95 % interval) of values - reference, pairs of one seed; None as half-width for one pair."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    if len(differences) < 2:
        return differences[0], None
    return statistics.mean(differences), (student_t(len(differences) - 1) * statistics.stdev(differences)
                                          / math.sqrt(len(differences)))


def steps_to(curve, loss):
    """Steps after which a curve of (step, loss) points, straight between them, first has at most loss; None: never."""
    for (a, before), (b, after) in zip(curve, curve[1:]):
        if before > loss >= after:
            return a + (b - a) * (before - loss) / (before - after)
    return None


def verdict(mean, half):
    if half is None:
        return "one seed: no error bar"
    if abs(mean) <= half:
        return "not distinguishable"
    return "better" if mean < 0 else "worse"


def summarize(results):
    """A dict for each variant of each matching, in order: means, standard errors and paired differences to the first."""
    rows, groups = [], {}
    for record in results["records"]:
        groups.setdefault((record["match"], record["variant"]), []).append(record)
    for (match, name), records in groups.items():
        first = next(group for (m, _), group in groups.items() if m == match)
        losses = [r["val_loss"] for r in records]
        row = records[0] | dict(val_loss=statistics.mean(losses), val_bpb=statistics.mean(r["val_bpb"] for r in records),
                                tokens_per_sec=statistics.median(r["tokens_per_sec"] for r in records), first=records is first,
                                se=statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None)
        row["difference"], row["half"] = paired(losses, [r["val_loss"] for r in first])
        row["curve"] = [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*(r["curve"] for r in records))]
        row["steps_to_first"] = steps_to(row["curve"], statistics.mean(r["val_loss"] for r in first))
        rows.append(row)
    return rows


def resolution(rows):
    """The half-width of a paired 95 % interval in nats, pooled over the variants; None for one seed."""
    halves = [row["half"] for row in rows if not row["first"] and row["half"] is not None]
    return math.sqrt(statistics.mean(h * h for h in halves)) if halves else None


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
                     + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def report(results, pictures):
    """report.md as text, from results.json alone."""
    rows, settings, machine = summarize(results), results["settings"], results["machine"]
    first = rows[0]["variant"]
    text = (f"# Comparison of {len({row['variant'] for row in rows})} variants, {settings['seeds']} seeds\n\n"
            f"{settings['max_steps']} steps of {settings['tokens_per_step']:,} tokens on data set {settings['dataset']} "
            f"(sha256 {results['dataset_sha256'][:16]}), tokenizer {results['tokenizer']}. {machine['gpu'] or machine['cpu']}, "
            f"{machine['threads']} threads, torch {machine['torch']}, {machine['dtype']}, {machine['ranks']} rank(s), "
            f"{results['date']}.\n\n")
    heads = {row["variant"]: row["heads"] for row in rows if "heads" in row}
    text += "".join(f"- {name}: {words}\n" for name, words in heads.items()) + "\n"
    titles = dict(shape=f"The shape held equal: only what the name says differs from {first}",
                  params=f"The parameters held equal: n_ff makes up for what differs from {first}")
    for match, title in titles.items():
        chosen = [row for row in rows if row["match"] == match]
        if not chosen:
            continue
        text += f"## {title}\n\n" + table(
            ["variant", "n_ff", "parameters", "without embedding", "training FLOPs per token", "cache, bytes per token",
             "validation loss", "bits per byte", f"difference to {first}, 95 % interval", "", f"steps to the loss of {first}"],
            [[row["variant"], row["n_ff"], f"{row['params']:,} ({row['params'] / chosen[0]['params'] - 1:+.2%})",
              f"{row['non_embedding_params']:,}", f"{row['flops_per_token']:,}", f"{row['kv_bytes_per_token']:,}",
              f"{row['val_loss']:.4f}" + (f" ± {row['se']:.4f}" if row["se"] is not None else ""), f"{row['val_bpb']:.4f}",
              "" if row["first"] else f"{row['difference']:+.4f}" + (f" ± {row['half']:.4f}" if row["half"] is not None else ""),
              "" if row["first"] else verdict(row["difference"], row["half"]),
              "never" if row["steps_to_first"] is None else f"{row['steps_to_first']:,.0f} ({row['steps_to_first'] * step_ms / 1e3:,.0f} s)"]
             for row in chosen for step_ms in [results["speed"][row["shape"]]["train"][0]["step_ms"]]]) + "\n"
    text += ("Loss in nats per token, mean over seeds ± standard error. Differences are of runs that share a seed, and with it the "
             "order of the data and every weight whose shape they share; the interval is Student's. Each interval is 95 % by "
             "itself, not all of them at once. Steps are read off the mean curve, straight between evaluations, their time is that of the "
             "steps alone.\n\n## What this run can resolve\n\n")
    half = resolution(rows)
    if half is None:
        text += "One seed, or one variant, gives no error bar: no difference above is shown to be more than chance.\n"
    else:
        text += (f"The half-width of its intervals is {half:.4f} nats, pooled over the variants: the smallest difference that this "
                 f"run could have seen. Published differences between MHA, GQA and MQA, near 124 million parameters, are "
                 f"{PUBLISHED[0]} to {PUBLISHED[1]} nats; "
                 + ("those would show in a run like this." if half < PUBLISHED[0] else
                    "the larger of those would show in a run like this, the smaller would not." if half < PUBLISHED[1] else
                    "none of those would show in a run like this.") + "\n")
    shapes = {}
    for row in rows:
        shapes.setdefault(row["shape"], row["variant"] + (f" (n_ff {row['n_ff']})" if row["match"] == "params" else ""))
    speed = results["speed"]
    text += "\n## Speed\n\n" + table(
        ["variant", "training step, ms", "tokens/s", "peak memory, MB", "tokens/s in the runs, median"],
        [[name, f"{t['step_ms']:.1f}", f"{t['tok_s']:,.0f}", f"{t['peak_memory_bytes'] / 1e6:,.0f}",
          f"{next(row['tokens_per_sec'] for row in rows if row['shape'] == shape):,.0f}"]
         for shape, name in shapes.items() for t in speed[shape]["train"]])
    for title, form in (("Decoding, ms per step", lambda cell: f"{cell['step_ms']:.2f}"),
                        ("Prefill, ms", lambda cell: f"{cell['prefill_s'] * 1e3:,.0f}"),
                        ("Peak memory while decoding, MB", lambda cell: f"{cell['peak_memory_bytes'] / 1e6:,.0f}")):
        text += f"\n{title}, batch x context:\n\n" + table(
            ["variant", *(f"{cell['batch_size']} x {cell['prompt_len']:,}" for cell in speed[rows[0]["shape"]]["decode"])],
            [[name, *map(form, speed[shape]["decode"])] for shape, name in shapes.items()])
    text += "\nSpeeds are the best of two rounds in turns, of random weights of the shape, by bench.py; memory is beyond the imports.\n"
    return text + "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)


def draw(results, out_dir):
    """The three pictures; none, and a line that says how to get them, without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no pictures: pip install matplotlib, then add --report_only=True")
        return []
    rows, paths = summarize(results), [out_dir / f"{name}.png" for name in ("curves", "quality", "decode")]
    matches = list(dict.fromkeys(row["match"] for row in rows))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["variant"] for row in rows))}

    def axes_of(n, width=5.5):
        figure, axes = plt.subplots(1, n, figsize=(width * n, 4), squeeze=False, layout="constrained")
        return figure, axes[0]

    figure, axes = axes_of(len(matches))
    for axis, match in zip(axes, matches):
        for name in dict.fromkeys(row["variant"] for row in rows if row["match"] == match):
            curves = [r["curve"] for r in results["records"] if (r["match"], r["variant"]) == (match, name)]
            steps = [step for step, _ in curves[0]]
            at = list(zip(*([loss for _, loss in curve] for curve in curves)))
            start = next((i for i, step in enumerate(steps) if step >= results["settings"]["warmup_steps"]), 0)
            axis.plot(steps[start:], [statistics.mean(x) for x in at[start:]], color=colors[name], label=name)
            axis.fill_between(steps[start:], [min(x) for x in at[start:]], [max(x) for x in at[start:]], color=colors[name],
                              alpha=0.2, linewidth=0)
        axis.set(title=f"{match} held equal", xlabel="step", ylabel="validation loss, nats per token (band: all seeds)")
        axis.legend()
    figure.savefig(paths[0], dpi=120)

    figure, axes = axes_of(len(matches))
    for axis, match in zip(axes, matches):
        for row in rows:
            if row["match"] == match:
                axis.errorbar(row["kv_bytes_per_token"], row["val_loss"], yerr=row["se"], marker="o", capsize=4,
                              color=colors[row["variant"]], label=row["variant"])
        axis.set(title=f"{match} held equal", xlabel="KV cache, bytes per token", xscale="log",
                 ylabel="validation loss, mean ± standard error")
        axis.set_xticks(sorted({row["kv_bytes_per_token"] for row in rows}), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.legend()
    figure.savefig(paths[1], dpi=120)

    shapes = {row["shape"]: row["variant"] for row in rows if row["match"] == matches[0]}
    batches = sorted({cell["batch_size"] for cell in results["speed"][rows[0]["shape"]]["decode"]})
    figure, axes = axes_of(len(batches))
    for axis, batch in zip(axes, batches):
        for shape, name in shapes.items():
            cells = [cell for cell in results["speed"][shape]["decode"] if cell["batch_size"] == batch]
            x = [cell["prompt_len"] for cell in cells]
            axis.plot(x, [cell["step_ms"] for cell in cells], marker="o", color=colors[name], label=name)
            if all(cell["mbu"] for cell in cells):  # the floor: a step that used all of the bandwidth
                axis.plot(x, [cell["step_ms"] * cell["mbu"] for cell in cells], linestyle=":", color=colors[name])
        axis.set(title=f"batch {batch}", xlabel="context, tokens", ylabel="decode step, ms (dotted: reading every byte once)",
                 xscale="log", yscale="log", xticks=x)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.minorticks_off()
        axis.legend()
    figure.savefig(paths[2], dpi=120)
    plt.close("all")
    return paths


def write_report(results, out_dir):
    pictures = draw(results, out_dir)
    (out_dir / "report.md").write_text(report(results, pictures))
    print((out_dir / "report.md").read_text())
    print(f"written: {', '.join(str(path) for path in (out_dir / 'report.md', out_dir / 'results.json', *pictures))}")


def load_results(path):
    try:
        results = json.loads(path.read_text())
        if not {"settings", "variants", "records", "speed", "machine"} <= results.keys():
            raise ValueError
        return results
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path} is no results file of this program: move it away, or choose another --out_dir") from None


@program
def main(argv):
    given = parse(CompareConfig, argv, __doc__, axes=True)
    config = build(CompareConfig, choices_of(given)[0])
    out_dir = Path(config.out_dir)
    path = out_dir / "results.json"
    if config.report_only:
        if not path.exists():
            raise UserError(f"there is no {path} to report: leave report_only out to make it")
        results = load_results(path)
        if not (results["records"] and results["speed"]):
            raise UserError(f"{path} is of a comparison that has not ended: leave report_only out to go on")
        return write_report(results, out_dir)
    base, runtime, variants = plan(given)
    dataset = Dataset(base.dataset)
    this = identity(base, given, variants, dataset)
    results = load_results(path) if path.exists() and not base.overwrite else None
    if results is not None:
        # what an older version did not know of was as it is by default
        settings, shape = ({f.name: f.default for f in fields(cls)} for cls in (CompareConfig, GPTConfig))
        there, here = ({**settings, **r, **r["settings"]} for r in (results, this))
        changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here
                   if there.get(key) != here[key] and key not in ("settings", "variants")]
        if changed or [{**shape, **variant} for variant in results["variants"]] != this["variants"]:
            raise UserError(f"{out_dir} holds a comparison of other settings ({'; '.join(changed)[:200] or 'other variants'}): choose "
                            "another --out_dir, or replace it with --overwrite=True")
    if results is None and (out_dir / "runs").exists() and not base.overwrite:
        raise UserError(f"{out_dir / 'runs'} holds runs, but {path} does not say of which settings: choose another --out_dir, or "
                        "replace them with --overwrite=True")
    check_writable(out_dir)
    if base.overwrite:
        shutil.rmtree(out_dir / "runs", ignore_errors=True)
    if results is None:
        results = dict(**this, machine=describe_machine(runtime), date=datetime.date.today().isoformat(), speed={}, records=[])
        write_json(path, results)
    for v in variants:
        print(f"{v.match:>6} equal: {v.name:<12} {v.facts['params']:,} parameters ({v.facts['params'] / variants[0].facts['params'] - 1:+.2%}"
              f" of the first), n_ff {v.config.n_ff}")
    if not results["speed"]:
        results["speed"] = measure(variants, base, given)
        write_json(path, results)

    runs = {v.run(seed): (v, seed) for seed in range(base.seed, base.seed + base.seeds) for v in variants}
    done = {name: steps_done(log_rows(out_dir / "runs" / name)) for name in runs}
    evaluated = (base.max_steps // base.eval_interval + 1) * min(base.eval_tokens or 10**18, dataset.val.n_tokens) / 3
    seconds = sum(max(0, base.max_steps - done[name]) / base.max_steps * (base.max_steps * base.tokens_per_step + evaluated)
                  / results["speed"][v.shape]["train"][0]["tok_s"] for name, (v, _) in runs.items())
    print(f"{len(runs)} runs of {base.max_steps:,} steps, {sum(n == base.max_steps for n in done.values())} of them finished; the rest "
          f"takes about {seconds / 60:.0f} minutes here", flush=True)
    with tqdm(total=len(runs) * base.max_steps, initial=sum(done.values()), unit="step", desc="training", disable=None) as bar:
        for name, (v, seed) in runs.items():
            if done[name] < base.max_steps:
                run_training(out_dir / "runs" / name, v.config, seed, bar)

    results["records"] = []
    for v in variants:
        for seed in range(base.seed, base.seed + base.seeds):
            rows = log_rows(out_dir / "runs" / v.run(seed))
            results["records"].append(dict(
                variant=v.name, match=v.match, seed=seed, **v.facts, val_loss=rows[-1]["val_loss"],
                val_bpb=bits_per_byte(rows[-1]["val_loss"], dataset.val), run=v.run(seed), shape=v.shape,
                tokens_per_sec=statistics.median(row["tokens_per_sec"] or 0.0 for row in rows),
                curve=[[row["step"], row["val_loss"]] for row in rows if row["val_loss"] is not None]))
    write_json(path, results)
    write_report(results, out_dir)


if __name__ == "__main__":
    main()
