"""Trains variants of a model with several seeds; reports quality, cache and speed.

    python compare.py                          MHA, GQA and MQA; prints how long it will take
    python compare.py --attention=gqa,mla      the same and multi-head latent attention
    python compare.py --n_head=1,2,4,8 --match=shape    any setting with a list is an axis
    python compare.py --design=mha,gqa,mla,window       the models of these files of config/
    python compare.py config/gpt2_124m.py --dataset=PATH --n_kv_head=12,4,2,1 --seeds=3

Losses and differences have error bars. Takes every setting of train.py. Writes runs, results.json,
report.md and, with matplotlib, pictures into out_dir. Run the same command again to resume, or
with a higher --seeds or further values in a list to add runs. Checkpoints of runs in results.json
are not needed for that.
"""
import datetime
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from bench import BenchConfig, heads_of
from model import GPT, GPTConfig
from nanogqa import costs, resume
from nanogqa.batches import batch_shape
from nanogqa.configurator import (
    UserError,
    build,
    choices_of,
    combinations,
    in_range,
    one_line,
    parse,
    program,
    settings_of_others,
    subset,
)
from nanogqa.dataloader import Dataset, prepare_default
from nanogqa.distributed import world
from nanogqa.files import created, lock, write_json
from nanogqa.report import remove_report, write_report
from nanogqa.results import (
    curve_of,
    evaluations,
    key_of,
    load_results,
    metrics_of,
    recorded_runs,
)
from nanogqa.runs import Run, ranks_of, train_runs
from nanogqa.runtime import describe_machine, pick_runtime
from nanogqa.terminal import say, warn
from train import TrainConfig

# -- settings --------------------------------------------------------------------------------------

Matching = Literal["both", "shape", "params"]


@dataclass
class CompareConfig(TrainConfig):
    # the comparison
    out_dir: str = "out/compare"  # folder for runs, results and the report
    max_steps: int = 800          # optimizer steps of each run
    eval_interval: int = 100      # steps between evaluations
    log_interval: int | None = None  # steps between log lines of a run; None: a run has about 50
    seeds: int = 3                # runs of each variant: seed, seed + 1 and so on; raise it to add
    match: Matching = "both"  # shape: change only listed settings; params: also adjust n_ff; both
    design: str | None = None     # a file of config/, without .py, with settings of the model
    controls: bool = False        # add MHA baselines of equal cache: fewer heads, narrower heads
    decode_batch_size: int | None = None  # batch sizes to time decoding with; default: 1,16
    decode_prompt_len: int | None = None  # contexts to time decoding at; default: 256,1024,4096
    report_only: bool = False     # write the report again from results.json

    def __post_init__(self):
        super().__post_init__()
        in_range(self, "max_steps decode_batch_size decode_prompt_len", low=1)
        in_range(self, "seeds", low=1, high=1000)
        if self.init_from != "scratch" or self.eval_only:
            raise ValueError("a comparison trains from scratch: leave out init_from and eval_only")


# These do not affect results: a comparison may be resumed with other values of them.
NO_EFFECT = ("out_dir", "report_only", "overwrite", "log_interval", "profile", "keep_checkpoints",
             "save_interval", "wandb_log", "wandb_project", "wandb_run_name")
# The files that the result of training mostly depends on, beside settings and data.
CODE = ("model.py", "train.py", "nanogqa/batches.py", "nanogqa/checkpoint.py",
        "nanogqa/dataloader.py", "nanogqa/distributed.py", "nanogqa/dropout.py", "nanogqa/fast.py",
        "nanogqa/runtime.py")
# All runs share these settings, so they take no list.
SHARED = (*NO_EFFECT, "seeds", "seed", "match", "controls", "dataset", "vocab_size", "block_size",
          "tokens_per_step", "max_steps", "eval_interval", "eval_tokens", "eval_only", "init_from",
          "device", "dtype", "compile", "parallel")
# The name of a variant shows these as MHA, GQA-2, MQA or MLA, or as the design, not as key=value.
KIND_SETTINGS = ("attention", "n_kv_head", "design")


# -- the plan --------------------------------------------------------------------------------------

@dataclass
class Choice:
    """A variant before its parameters are matched: one value on every axis, or a control."""
    name: str
    config: TrainConfig
    control: bool = False


@dataclass
class Variant:
    """A model of the comparison, in one of the two matchings."""
    name: str                     # MHA, GQA-2, MQA, MLA and its values on other axes
    match: str                    # shape or params: what it has in common with the first variant
    config: TrainConfig           # complete except for seed and out_dir
    facts: dict                   # heads, sizes and costs for the records: see facts_of
    control: bool = False         # a baseline of controls_of, which no axis lists

    @property
    def key(self):
        """Names its model for timings and runs; both matchings share those where n_ff is equal."""
        return key_of(self.name, self.config.n_ff)

    def run_name(self, seed):
        """The folder of its run with this seed."""
        return f"{self.key}-seed{seed}"


def plan(given):
    """(CompareConfig, Runtime, variants) of the given settings.

    The others of a matching are compared to its first variant. Raises UserError if one of the runs
    or timings cannot work; nothing is written to out_dir.
    """
    config = first_config(given)
    runtime = pick_runtime(config.device, config.dtype, config.compile)
    prepare_default(config.dataset)
    choices = plan_choices(config, settings_of_runs(config, given))
    matches = [config.match]
    if config.match == "both":
        matches = ["shape", "params"]
    variants = []
    for match in matches:
        variants += distinct(match_variants(choices, match, runtime))
    check_plan(config, variants, given)
    return config, runtime, variants


def check_plan(config, variants, given):
    """Raises UserError if one of the runs or timings cannot work."""
    for key in ("decode_batch_size", "decode_prompt_len"):
        if isinstance(given.get(key), list) and None in given[key]:
            raise UserError(f"{key} takes a list of numbers: leave None out")
    dataset = Dataset(config.dataset)
    names = {(variant.match, variant.name) for variant in variants}
    folders = {(variant.match, variant.key) for variant in variants}
    if min(len(names), len(folders)) < len(variants):
        raise UserError("two different models have one name, or names that differ in punctuation "
                        "alone: leave out one of the axes, or compare them with two commands")
    if config.parallel == "fsdp" and ranks_of(config) == 1:
        raise UserError("parallel=fsdp needs several GPUs: choose --parallel=ddp")
    for variant in variants:
        if "," in variant.config.trainable:  # bench.py would read a list
            raise UserError(f"trainable={variant.config.trainable} holds a comma, which compare.py "
                            "cannot pass on: write it without one")
        resume.check_run(GPT, GPTConfig, variant.config, dataset, ranks_of(config))
    for timing in plan_timings(variants, config, given):
        for values in combinations(timing.settings):
            build(BenchConfig, {"mode": timing.mode, **values})


def first_config(given):
    """The CompareConfig with the first value of every axis, and with what all runs share."""
    for key in SHARED:
        if isinstance(given.get(key), list):
            raise UserError(f"{key} takes one value in a comparison: every run shares it")
    return build(CompareConfig, with_design(choices_of(given, CompareConfig)[0]))


def with_design(values):
    """values with the settings of their design, if they have one.

    Raises UserError if its file sets more than the model.
    """
    design = values.get("design")
    if design is None:
        return values
    path = Path(__file__).resolve().with_name("config") / f"{design}.py"
    if not re.fullmatch(r"\w+", design) or not path.exists():
        raise UserError(f"there is no design {design[:100]}: name a file of {path.parent}, without "
                        ".py")
    settings = parse(TrainConfig, [str(path)], __doc__)
    settings.pop("out_dir", None)
    model = {field.name for field in fields(GPTConfig)}
    for key in settings:
        if key not in model or key in SHARED:
            raise UserError(f"design={design}: {path} sets {key}, but a design is a model alone, "
                            "without what all runs share: choose another file")
    for key in ("attention", "n_kv_head", *settings):
        if key in values:
            raise UserError(f"{key} is given, but belongs to a design such as {design}: leave "
                            f"{key} out, or write a design with it")
    return values | settings


def settings_of_runs(config, given):
    """The settings of all runs; a list is an axis, and the last axis varies fastest.

    If n_kv_head is to be compared (see wants_head_counts), it becomes an axis: n_head, the given
    value or half of n_head, and 1.
    """
    names = {field.name for field in fields(TrainConfig)} | {"design"}
    settings = {}
    if isinstance(given.get("attention"), list):
        settings["attention"] = given["attention"]  # the first axis: variants of one kind together
    for key, value in given.items():
        if key in names:
            settings[key] = value
    settings["max_steps"] = config.max_steps
    settings["eval_interval"] = config.eval_interval
    settings["log_interval"] = config.log_interval or max(1, config.max_steps // 50)
    settings["out_dir"] = ""
    settings["overwrite"] = False
    settings["vocab_size"] = config.vocab_size or Dataset(config.dataset).meta["vocab_size"]
    if wants_head_counts(config, settings):
        head_counts = (config.n_head, settings.get("n_kv_head") or half_of(config.n_head), 1)
        settings["n_kv_head"] = list(dict.fromkeys(head_counts))
    if isinstance(settings.get("n_kv_head"), list):
        settings["n_kv_head"] = sorted(settings["n_kv_head"], key=mha_first)
    return settings


def wants_head_counts(config, settings):
    """Whether n_kv_head becomes an axis although it was not listed."""
    axes = axes_of(settings)
    if not axes:
        return config.attention == "gqa" and config.design is None
    others = settings_of_others(GPTConfig, "gqa")
    kinds_only = "attention" in axes and set(axes) <= {"attention", *others}
    return kinds_only and "n_kv_head" not in settings


def half_of(n_head):
    """The largest number up to half of n_head that divides it."""
    return max([n for n in range(1, n_head // 2 + 1) if n_head % n == 0], default=1)


def axes_of(settings):
    return [key for key, value in settings.items() if isinstance(value, list)]


def mha_first(n_kv_head):
    """Sorts from many to few; None stands for n_head."""
    return -(n_kv_head or sys.maxsize)


def plan_choices(config, settings):
    """A Choice for every combination of values on the axes, each followed by its controls."""
    axes = axes_of(settings)
    other_axes = [key for key in axes if key not in KIND_SETTINGS]
    # where other settings alone are listed, all variants have the same kind of attention
    show_kind = not axes or len(other_axes) < len(axes)
    points = choices_of(settings, TrainConfig)
    configs = []
    for values in points:
        complete = dict(with_design(values))
        complete.pop("design", None)
        configs.append(build(TrainConfig, complete))
    differing = {}
    if config.design is None:
        differing = differing_settings(configs, axes)
    choices = []
    for values, variant_config in zip(points, configs, strict=True):
        details = [f"{key}={values[key]}" for key in other_axes if key in values]
        details += changed_from(differing, variant_config)
        design = values.get("design")
        if design is not None:
            details.insert(0, design)
        words = details
        if show_kind and design is None:
            words = [attention_kind(variant_config), *details]
        choices.append(Choice(" ".join(words), variant_config))
        if config.controls:
            choices += controls_of(variant_config, details)
    return choices


def differing_settings(configs, axes):
    """{name: default} of the model settings that are at their default in some variants only.

    A name must show them, although they are not an axis: --attention=gqa,mla --qkv_bias=True sets
    qkv_bias only where attention is gqa. Settings with a default of None are skipped, since their
    value follows from other settings.
    """
    differing = {}
    for setting in fields(GPTConfig):
        name, default = setting.name, setting.default
        if default is None or name in KIND_SETTINGS or name in axes:
            continue
        values = [getattr(config, name) for config in configs]
        if 0 < values.count(default) < len(values):
            differing[name] = default
    return differing


def changed_from(defaults, config):
    """key=value of each of these settings that config changes from its default."""
    changed = []
    for key, default in defaults.items():
        if getattr(config, key) != default:
            changed.append(f"{key}={getattr(config, key)}")
    return changed


def attention_kind(config):
    if config.attention != "gqa":
        return config.attention.upper()
    if config.n_kv_head == config.n_head:
        return "MHA"
    if config.n_kv_head == 1:
        return "MQA"
    return f"GQA-{config.n_kv_head}"


def controls_of(config, details):
    """MHA baselines with the cache of a GQA model (Shazeer 2019): fewer heads, narrower heads.

    Narrower heads need a whole, even width, since RoPE rotates pairs, and a part of them to rotate
    if the model has one. The names end with details.
    """
    count = config.n_kv_head
    if count == config.n_head:
        return []
    fewer = replace(config, n_head=count)
    label = "1 head" if count == 1 else f"{count} heads"
    controls = [Choice(" ".join([label, *details]), fewer, control=True)]
    width, rest = divmod(config.head_dim * count, config.n_head)
    rotates = round(config.rope_fraction * width / 2) > 0 or config.rope_fraction == 0
    if rest == 0 and width % 2 == 0 and rotates:
        narrower = replace(config, n_kv_head=config.n_head, head_dim=width)
        controls.append(Choice(" ".join([f"heads of {width}", *details]), narrower, control=True))
    return controls


def match_variants(choices, match, runtime):
    """A Variant for each choice; match="params" adjusts n_ff to the parameters of the first."""
    variants = []
    for choice in choices:
        config = replace(choice.config)
        facts = facts_of(config, runtime)
        wanted = facts["params"]
        if match == "params" and variants:
            wanted = variants[0].facts["params"]
        if facts["params"] != wanted:
            config.n_ff = matching_n_ff(config, facts["params"], wanted)
            facts = facts_of(config, runtime)
        variants.append(Variant(choice.name, match, config, facts, choice.control))
    return variants


def distinct(variants):
    """The variants of a matching, each model once: values that repeat one, as n_kv_head=4,None with
    n_head=4, and controls that are another variant's model are left out.

    Raises UserError if two listed names are one model: equal parameters change n_ff, also where it
    is the axis.
    """
    listed = [variant for variant in variants if not variant.control]
    unique = []
    for variant in variants:
        others = unique
        if variant.control:
            others = unique + listed
        twins = [other.name for other in others if other.config == variant.config]
        if not twins:
            unique.append(variant)
        elif not variant.control and variant.name not in twins:
            raise UserError(f"with equal {variant.match}, {twins[0]} and {variant.name} are the "
                            "same model: leave one of them out, or choose another --match")
    return unique


def facts_of(config, runtime):
    """Heads, sizes and costs of a model, for the records."""
    model = costs.meta_model(GPT, subset(GPTConfig, config))
    heads = [f"n_head {config.n_head}"]
    for name, value in heads_of(config).items():
        if value is not None and name != "attention":
            heads.append(f"{name} {value}")
    return dict(
        heads=", ".join(heads),
        n_ff=config.n_ff,
        params=costs.num_params(model),
        non_embedding_params=costs.num_params(model, embedding=False),
        flops_per_token=costs.flops_per_token(model),
        kv_bytes_per_token=costs.kv_bytes_per_token(config, runtime.dtype),
        kv_bytes_of_context=costs.kv_cache_bytes(config, costs.CONTEXT, runtime.dtype),
    )


def matching_n_ff(config, params, wanted):
    """The n_ff that brings a model of params parameters within 0.5 % of wanted: a multiple of 8,
    for fast matrix products, if there is one. Raises UserError if there is none at all."""
    per_unit = 3 * config.n_layer * config.n_embd  # a row of gate and up, a column of down
    exact = config.n_ff + (wanted - params) / per_unit
    if exact < 1:
        raise UserError(f"no n_ff reduces {params:,} parameters to the {wanted:,} of the first "
                        "variant: choose --match=shape")
    for multiple in (8, 1):
        n_ff = round(exact / multiple) * multiple
        if n_ff > 0 and abs(n_ff - exact) * per_unit <= 0.005 * wanted:
            return n_ff
    raise UserError(f"no n_ff brings {params:,} parameters within 0.5 % of the {wanted:,} of the "
                    "first variant: choose --match=shape")


# -- new results, or those of the comparison to resume ---------------------------------------------

def identity(config, given, variants, dataset):
    """What defines a comparison, as JSON values; only results of an equal identity are resumed."""
    settings = asdict(config)
    for key in NO_EFFECT:
        del settings[key]
    for key in ("decode_batch_size", "decode_prompt_len"):  # config has only the first of a list
        settings[key] = given.get(key)
    models = []
    for variant in variants:
        model = asdict(subset(GPTConfig, variant.config))
        models.append({"match": variant.match, "name": variant.name, **model})
    values = {"settings": settings, "variants": models, "dataset_sha256": dataset.meta["sha256"],
              "tokenizer": dataset.meta["tokenizer"]}
    return json.loads(json.dumps(values))


def open_results(config, runtime, wanted):
    """The results in out_dir, or new ones; wanted is the identity of this comparison.

    Raises UserError where out_dir holds another comparison, unless overwrite is set. Nothing is
    written.
    """
    out_dir = Path(config.out_dir)
    path = out_dir / "results.json"
    runs = out_dir / "runs"
    if not config.overwrite:
        if path.exists():
            results = load_results(path, CompareConfig)
            check_same_comparison(results, wanted, out_dir)
            check_machine(results, runtime, out_dir)
            if results.get("code", code_digest()) != code_digest():
                warn(f"one of {', '.join(CODE)} has changed since {path} was begun: finished runs "
                     "stay as they are, all others use the new code, and may differ for that "
                     "reason; choose another --out_dir to begin again")
            if complete_variants(results) != complete_variants(wanted):
                results.update(variants=wanted["variants"], speed={})  # all are timed in one go
            return results
        if runs.exists():
            raise UserError(f"{runs} holds runs, but there is no {path} with their settings: "
                            "choose another --out_dir, or replace them with --overwrite=True")
    return dict(wanted, code=code_digest(), speed={}, records=[])


def check_same_comparison(results, wanted, out_dir):
    """Raises UserError where results differ from wanted, unless wanted has more seeds or further
    variants."""
    there = comparable(results)
    here = comparable(wanted)
    differences = []
    for key in here | there:
        value = here.get(key)
        if key == "seeds" and value > there[key]:
            continue  # the runs that are missing are added
        if there.get(key) != value:
            differences.append(f"{key} {there.get(key)} there, {value} here")
            if key == "seeds":
                differences[-1] += " (they can only be raised)"
    before, now = complete_variants(results), complete_variants(wanted)
    if not differences:
        for key, value in now[0].items():
            if before[0].get(key) != value:
                differences.append(f"{key} of the first variant is {value}, not "
                                   f"{before[0].get(key)}")
    if not differences and any(model not in now for model in before):
        differences.append("other variants; they can only be added, after the first")
    if differences:
        raise UserError(f"{out_dir} holds a comparison with different settings "
                        f"({one_line('; '.join(differences))}): choose another --out_dir, or "
                        "replace it with --overwrite=True")


def comparable(results):
    """One flat dict of all settings and of the data set. Missing settings take their defaults."""
    values = defaults_of(CompareConfig)
    values.update(results["settings"])
    del values["dtype"]      # check_machine compares the resolved dtype
    del values["n_kv_head"]  # the first of a list as it was given; variants have it, sorted
    for key in ("dataset_sha256", "tokenizer"):
        values[key] = results.get(key)
    return values


def check_machine(results, runtime, out_dir):
    """Raises UserError where runs would have another dtype than those in results. Warns of another
    version of torch and of another kind of device, which affect losses too."""
    here, there = runtime.describe()["dtype"], results["machine"]["dtype"]
    if here != there:
        raise UserError(f"{out_dir} holds runs in {there}, and further ones would be in {here}: "
                        f"add --dtype={there}, or choose another --out_dir")
    now = dict(runtime.describe(), torch=torch.__version__)
    for key in ("torch", "device"):
        before = results["machine"].get(key, now[key])
        if before != now[key]:
            warn(f"{out_dir} holds runs with {key} {before}, and further ones have {now[key]}: "
                 "differences may come from that; choose another --out_dir to begin again")


def code_digest():
    """The sha256 of the files in CODE, as text."""
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((Path(__file__).resolve().parent / name).read_bytes())
    return digest.hexdigest()


def complete_variants(results):
    """The variants with all settings of their models: missing ones take their defaults."""
    variants = []
    for variant in results["variants"]:
        variants.append({**defaults_of(GPTConfig), **variant})
    return variants


def defaults_of(cls):
    return {field.name: field.default for field in fields(cls)}


# -- speed -----------------------------------------------------------------------------------------

@dataclass
class Timing:
    """One call of bench.py."""
    key: str = field(compare=False)  # timings are equal if bench.py would do the same
    mode: str                     # train or decode
    settings: dict                # of bench.py


def measure_speed(variants, config, given):
    """{key: {"train": [row], "decode": rows}} of each variant: rows of bench.py, the faster of two
    rounds.

    Every timing has its own process. A second round follows the first, instead of timing each
    model twice in a row, since a shared machine may be busy for a while. Variants that bench.py
    cannot tell apart, such as two learning rates, share a timing.
    """
    timings = plan_timings(variants, config, given)
    different = []
    for timing in timings:
        if timing not in different:
            different.append(timing)
    rows = []
    for timing in tqdm(different, desc="speed, round 1 of 2", disable=None):
        rows.append(run_bench(timing))
    for i, timing in enumerate(tqdm(different, desc="speed, round 2 of 2", disable=None)):
        rows[i] = faster_rows(rows[i], run_bench(timing))
    speed = {}
    for timing in timings:
        speed.setdefault(timing.key, {})[timing.mode] = rows[different.index(timing)]
    return speed


def plan_timings(variants, config, given):
    """A Timing of training and one of decoding for each model."""
    shared = {"seed": config.seed, "device": config.device, "dtype": config.dtype}
    decoding = {"batch_size": [1, 16], "prompt_len": [256, 1024, 4096], "new_tokens": 16,
                "repeats": 5, "compile": False}
    if config.decode_batch_size:
        decoding["batch_size"] = given["decode_batch_size"]
    if config.decode_prompt_len:
        decoding["prompt_len"] = given["decode_prompt_len"]
    timings = []
    models = {variant.key: variant.config for variant in variants}
    for key, run in models.items():
        batch_size, micro_steps = batch_shape(run, ranks_of(run))
        training = {"batch_size": batch_size, "micro_steps": micro_steps,
                    "steps": max(5, 30 // micro_steps), "compile": config.compile,
                    "optimizer": run.optimizer, "trainable": run.trainable,
                    "recompute": run.recompute}
        settings = {**shared, **asdict(subset(GPTConfig, run)), "fast": run.fast}
        timings.append(Timing(key, "train", {**settings, **training}))
        for name in ("block_size", "dropout"):  # of training alone
            del settings[name]
        timings.append(Timing(key, "decode", {**settings, **decoding}))
    return timings


def bench_command(timing):
    """The command of bench.py."""
    bench = Path(__file__).resolve().with_name("bench.py")
    command = [sys.executable, bench, f"--mode={timing.mode}"]
    for key, value in timing.settings.items():
        if isinstance(value, list):
            value = ",".join(map(str, value))
        command.append(f"--{key}={value}")
    return command


def run_bench(timing):
    """The rows of one call of bench.py."""
    command = bench_command(timing)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        remedy = "its settings are those of the runs"
        if timing.mode == "decode":
            remedy = "its batch_size and prompt_len are decode_batch_size and decode_prompt_len"
        raise UserError(f"bench.py --mode={timing.mode} failed for {timing.key} "
                        f"({one_line(lines[-1])}): {remedy}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result.get("rows", [result])


def faster_rows(rows, again):
    """The faster one of each pair of rows from two rounds, with the faster reading of prompts."""
    faster = []
    for pair in zip(rows, again, strict=True):
        row = dict(min(pair, key=step_ms))
        if "prefill_s" in row:
            row["prefill_s"] = min(one["prefill_s"] for one in pair)
        faster.append(row)
    return faster


def step_ms(row):
    return row["step_ms"]


# -- runs ------------------------------------------------------------------------------------------

def seeds_of(config):
    return range(config.seed, config.seed + config.seeds)


def plan_runs(variants, config):
    """Every run once, all variants with the first seed before those with the next."""
    runs = {}
    for seed in seeds_of(config):
        for variant in variants:
            name = variant.run_name(seed)
            path = Path(config.out_dir) / "runs" / name
            runs[name] = Run(variant.config, variant.key, seed, path)
    return list(runs.values())


# -- records ---------------------------------------------------------------------------------------

def collect_records(variants, runs, config, dataset):
    """A record for each variant and seed: what the report is made of."""
    rows = {run.folder.name: run.rows() for run in runs}
    records = []
    for variant in variants:
        for seed in seeds_of(config):
            records.append(record_of(variant, seed, rows[variant.run_name(seed)], dataset))
    return records


def record_of(variant, seed, rows, dataset):
    """The record of a run with these rows of metrics.jsonl, evaluated on dataset."""
    last = evaluations(rows)[-1]
    return dict(
        variant=variant.name, match=variant.match, seed=seed, **variant.facts,
        val_loss=last["val_loss"], val_bpb=dataset.metrics(last["val_loss"]).get("val_bpb"),
        metrics=metrics_of(last), run=variant.run_name(seed), shape=variant.key,
        curve=curve_of(rows))


# -- the program -----------------------------------------------------------------------------------

def report_again(config):
    """Writes the report of a finished comparison from its results.json."""
    path = Path(config.out_dir) / "results.json"
    if not path.exists():
        raise UserError(f"there is no {path} to report: run the comparison first, without "
                        "report_only")
    results = load_results(path, CompareConfig)
    if not results["records"] or not results["speed"]:
        raise UserError(f"{path} belongs to an unfinished comparison: leave report_only out to "
                        "finish it")
    write_report(results, Path(config.out_dir))


def remove_runs(folder):
    """Removes all runs in folder, which may be a link to another disk."""
    if folder.exists():
        for run in folder.iterdir():
            if run.is_dir():
                shutil.rmtree(run)


def print_variants(variants):
    first_params = variants[0].facts["params"]
    for variant in variants:
        params = variant.facts["params"]
        print(f"equal {variant.match:<6}  {variant.name:<12} {params:,} parameters "
              f"({params / first_params - 1:+.2%} of the first), n_ff {variant.config.n_ff}")


@program
def main(argv):
    given = parse(CompareConfig, argv, __doc__, axes=True)
    if world().ranks > 1:
        raise UserError("compare.py starts torchrun itself, with a rank for each GPU: start it "
                        "without torchrun")
    config = first_config(given)
    if config.report_only:
        report_again(config)
        return
    config, runtime, variants = plan(given)
    busy = (f"another compare.py writes to {config.out_dir}: wait until it has ended, or choose "
            "another --out_dir")
    with created(config.out_dir), lock(config.out_dir, busy, patience=0):
        carry_out(config, runtime, variants, given)


def carry_out(config, runtime, variants, given):
    """Times and trains what is planned, and writes the results and the report into out_dir."""
    dataset = Dataset(config.dataset)
    results = open_results(config, runtime, identity(config, given, variants, dataset))
    runs = plan_runs(variants, config)
    if not config.overwrite:
        records = recorded_runs(results)
        for run in runs:
            run.look(dataset, records, GPTConfig)
    else:
        say("to continue this comparison later, repeat the command without --overwrite=True")
    print_variants(variants)

    out_dir = Path(config.out_dir)
    path = out_dir / "results.json"
    if not results["speed"]:
        results["machine"] = describe_machine(runtime, ranks_of(config))
        results["date"] = datetime.date.today().isoformat()
        results["speed"] = measure_speed(variants, config, given)
        if config.overwrite:  # only now: if a timing fails, everything stays as it was
            remove_runs(out_dir / "runs")
            remove_report(out_dir)
        if not results["records"]:
            write_json(path, results)
    train_runs(runs, config, results, dataset, GPTConfig)
    # until here, results.json of a finished comparison that is being extended stays as it was
    results["settings"]["seeds"] = config.seeds
    results["records"] = collect_records(variants, runs, config, dataset)
    write_json(path, results)
    write_report(results, out_dir)


if __name__ == "__main__":
    main()
