"""Checks and times this repository on a GPU.

    python results/gpu.py --minutes=9
    python results/gpu.py --smoke=True         all of it at toy size on a CPU, 90 s of its time

Ends by itself before its minutes are over. Each row is in gpu.json as soon as it is measured, and
the same command again goes on with those that are missing. gpu.md has the tables of gpu.json, and
gpu.log what the rows printed. Rows of another device or version of the programs are kept apart.
"""
import contextlib
import functools
import gc
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
from gpu_tables import COLUMNS, check_cells, has_failed, tables

from nanogqa import schema
from nanogqa.configurator import UserError, build, in_range, one_line, parse, program
from nanogqa.files import check_writable, replacing, write_json

PARTS = ("check", "decode", "train", "compare")


@dataclass
class GpuConfig:
    out_dir: str = "out/gpu"  # folder for gpu.json, gpu.md and gpu.log
    minutes: float = 9.0  # the script ends before they are over
    parts: str = ",".join(PARTS)  # what to measure, in this order
    rows: str = ""  # only rows whose name contains this text; empty: all
    again: bool = False  # measure failed rows again
    smoke: bool = False  # toy sizes, on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda, or cpu in a smoke run

    def __post_init__(self):
        in_range(self, "minutes", low=0)
        for part in self.parts.split(","):
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r}: choose among {', '.join(PARTS)}")
        if self.device == "auto":
            self.device = "cpu" if self.smoke else "cuda"


# -- the rows --------------------------------------------------------------------------------------

@dataclass
class Row:
    part: str
    name: str
    function: str  # of gpu_check.py or gpu_speed.py
    settings: dict  # its arguments
    seconds: float  # estimate on an H100, with the start of a process
    target: dict = field(default_factory=dict)  # {key of the result: what it should reach}
    beside: str = ""  # name of the row that its step is compared with
    resumes: bool = False  # a row that runs out of time goes on in the next call

    @property
    def process(self):
        """Rows with the same value share a process. Those that time something have their own."""
        return "check" if self.part == "check" else self.name


def plan(config):
    """The rows of the wanted parts, in the order in which they are measured."""
    rows = []
    for part in config.parts.split(","):
        rows += {"check": check_rows, "decode": decode_rows, "train": train_rows,
                 "compare": compare_rows}[part](config)
    if config.smoke:
        for row in rows:
            row.seconds = 20.0
            if row.part != "compare":
                row.settings = toy(row.settings)
    return [row for row in rows if config.rows in row.name]


# settings of a smoke run, in place of those of that name
TOY = dict(n_layer=2, n_embd=64, n_ff=None, vocab_size=257, block_size=32, prompt_len=12,
           new_tokens=4, repeats=1, steps=2, tokens=64, width=16, batch_size=2)


def toy(settings):
    """The settings of a row at toy size, with the same kind of attention."""
    small = {**settings, **{key: value for key, value in TOY.items() if key in settings}}
    if "n_head" in settings:
        small["n_head"] = 4
        if "n_kv_head" in settings:
            small["n_kv_head"] = max(1, 4 * settings["n_kv_head"] // settings["n_head"])
    return small


def check_rows(config):
    shared = dict(device=config.device, toy=config.smoke)
    rows = []

    def add(name, function, seconds, **settings):
        rows.append(Row("check", name, f"gpu_check.{function}", {**shared, **settings}, seconds))
    for dtype in ("float32", "bfloat16"):
        add(f"plain against fast model, {dtype}", "plain_against_fast", 10, dtype=dtype)
        add(f"cached against full logits, {dtype}", "cached_against_full", 10, dtype=dtype)
        add(f"ragged rows against rows alone, {dtype}", "ragged_rows", 10, dtype=dtype)
        add(f"GQA native, folded, expanded, {dtype}", "gqa_ways", 10, dtype=dtype)
        add(f"MLA absorbed against expanded, {dtype}", "mla_ways", 10, dtype=dtype)
    for dtype in ("bfloat16", "float32"):
        add(f"kernels of attention, {dtype}", "attention_kernels", 60, dtype=dtype)
    for kind in ("GQA", "MLA"):
        add(f"64 compiled steps, {kind}", "compiled_steps", 60, dtype="bfloat16", kind=kind)
    add("training losses, AdamW", "training_losses", 60, optimizer="adamw",
        ways=[["bfloat16", False], ["bfloat16", True]])
    add("training losses, Muon", "training_losses", 20, optimizer="muon",
        ways=[["bfloat16", False]])
    add("resume", "resume", 20)
    add("FSDP on one rank", "fsdp", 20)
    add("out of memory", "out_of_memory", 15)
    return rows


LLAMA_7B = dict(n_layer=32, n_head=32, n_embd=4096, n_ff=11008, vocab_size=32000, qk_norm=False,
                tie_embeddings=False, batch_size=1, prompt_len=64, new_tokens=128)
SMALL = dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=768, vocab_size=50304, batch_size=1,
             prompt_len=64, new_tokens=128)
LONG = dict(n_layer=4, n_head=32, n_embd=4096, n_ff=11008, vocab_size=32000, batch_size=64,
            prompt_len=8160, new_tokens=16)  # at 8,176 tokens, MHA caches below 2^31 numbers
LONG_KINDS = {"MHA": dict(n_kv_head=32), "GQA, 8 heads": dict(n_kv_head=8),
              "MQA": dict(n_kv_head=1), "MLA": dict(attention="mla")}


def decode_rows(config):
    shared = dict(device=config.device, dtype="bfloat16", compile=not config.smoke)
    decoding = dict(**shared, prefill=False)
    rows = []

    def add(name, function, seconds, settings, **more):
        rows.append(Row("decode", name, f"gpu_speed.{function}", settings, seconds, **more))
    add("Llama-7B shape", "decode", 120, {**LLAMA_7B, **decoding}, target=dict(mbu=0.75),
        beside="transformers, Llama-7B shape")
    add("12 x 768", "decode", 50, {**SMALL, **decoding, "compile": True},
        target=dict(decode_tok_s=3000), beside="transformers, 12 x 768")
    add("12 x 768, eager", "decode", 25, {**SMALL, **shared, "compile": False}, beside="12 x 768")
    for kind, heads in LONG_KINDS.items():
        add(f"4 x 4096, {kind}", "decode", 40, {**LONG, **heads, **decoding},
            beside="4 x 4096, MHA")
    add("transformers, Llama-7B shape", "transformers_decode", 120, {**LLAMA_7B, **shared})
    add("transformers, 12 x 768", "transformers_decode", 70, {**SMALL, **shared})
    for kind, heads in LONG_KINDS.items():
        add(f"4 x 4096, {kind}, eager", "decode", 25,
            {**LONG, **heads, **decoding, "compile": False}, beside="4 x 4096, MHA, eager")
    for heads, folded, width in ((32, 1, 128), (8, 4, 128), (1, 32, 128), (1, 32, 576)):
        settings = dict(device=config.device, dtype="bfloat16", batch_size=64, heads=heads,
                        rows=folded, tokens=8176, width=width)  # MHA: below 2^31 numbers
        add(f"attention, {heads} heads of {width}", "attention", 20, settings)
    return rows


GPT_124M = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, block_size=1024,
                batch_size=32, steps=30)
GPT_350M = {**GPT_124M, "n_layer": 24, "n_head": 16, "n_embd": 1024, "batch_size": 16}


def train_rows(config):
    shared = dict(device=config.device, dtype="bfloat16", compile=not config.smoke)
    plain = "124M, plain PyTorch"
    rows = []

    def add(name, function, seconds, settings, **more):
        rows.append(Row("train", name, f"gpu_speed.{function}", settings, seconds, **more))
    add("124M, AdamW", "train", 90, {**GPT_124M, **shared, "compile": True},
        target=dict(mfu=0.45), beside=plain)
    add(plain, "plain_train", 70, {**GPT_124M, **shared})
    add("124M, all logits at once", "train", 90, {**GPT_124M, **shared, "chunked": False},
        beside=plain)
    add("124M, Muon", "train", 90, {**GPT_124M, **shared, "optimizer": "muon"}, beside=plain)
    add("350M, AdamW", "train", 140, {**GPT_350M, **shared}, target=dict(mfu=0.50))
    add("first command", "first_command", 90, dict(device=config.device, toy=config.smoke))
    return rows


def compare_rows(config):
    settings = dict(attention="gqa,mla", seeds=2, max_steps=1500, eval_interval=300, n_layer=6,
                    n_head=6, n_embd=384, block_size=256, tokens_per_step=2**14,
                    eval_tokens=2**18, decode_prompt_len=256)
    seconds = 360
    if config.smoke:
        settings = dict(attention="mla", seeds=1, max_steps=4, eval_interval=4, n_layer=1,
                        n_head=4, n_embd=64, block_size=32, tokens_per_step=2**7,
                        eval_tokens=2**11, decode_prompt_len=12)
    settings.update(match="shape", warmup_steps=100, learning_rate=1e-3, compile=False,
                    decode_batch_size=1, folder="compare", device=config.device,
                    toy=config.smoke)
    return [Row("compare", "compare.py", "gpu_speed.compare", settings, seconds, resumes=True)]


# -- a process that measures -----------------------------------------------------------------------

class Worker:
    """A process that measures one row at a time, so that a crash or a hang ends nothing else."""

    def __init__(self, out, tree, name, backend):
        self.name = name
        folder = out / "work" / tree  # where rows keep files that a later call goes on with
        folder.mkdir(parents=True, exist_ok=True)
        with open(out / "gpu.log", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).resolve(), "worker", backend],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8",
                cwd=folder, start_new_session=True)

    def measure(self, row, seconds):
        """The outcome of a row: its result, or {"error": why}."""
        ended = threading.Event()

        def end():
            ended.set()
            self.end()
        timer = threading.Timer(seconds, end)
        timer.start()
        line = ""
        try:
            self.process.stdin.write(json.dumps(asdict(row)) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # the process has ended
            pass
        timer.cancel()
        if line:
            return json.loads(line)
        if ended.is_set():
            return {"error": f"not finished after {seconds:.0f} s", "timeout": True}
        return {"error": f"its process ended with code {self.process.wait()}: see gpu.log"}

    def end(self):
        """Ends the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def work(backend):
    """The worker: reads rows as lines of JSON and answers with their outcomes. backend is that of
    torch.compile."""
    torch.compile = functools.partial(torch.compile, backend=backend)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a row prints goes to gpu.log
    for line in sys.stdin:
        outcome = outcome_of(json.loads(line))
        print(json.dumps(outcome), file=answers, flush=True)


def outcome_of(row):
    print(f"\n-- {row['name']}", flush=True)
    start = time.perf_counter()
    try:
        module, function = row["function"].split(".")
        outcome = getattr(importlib.import_module(module), function)(**row["settings"])
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {one_line(error)}"}
    torch.compiler.reset()
    torch.backends.cuda.enable_cudnn_sdp(True)
    gc.collect()
    return {**outcome, "took_s": time.perf_counter() - start}


# -- gpu.json --------------------------------------------------------------------------------------

MEASURED = {"part": str, "name": str, "settings": {}, "device": str, "tree": str,
            "outcome": {"checks?": [{"what": str, "passed": (bool,), "limit": schema.number}]},
            "target": {str: schema.number}, "beside": str}


def load(path):
    """The rows of gpu.json. Raises UserError if it is damaged."""
    if not path.exists():
        return []
    try:
        return schema.read_json(path, {"rows": [MEASURED]})["rows"]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): remove it, or choose another "
                        "--out_dir") from None


def places_of(config):
    """{part: what its rows are kept apart by}: the device with the version of torch, and that of
    the files that they run, without gpu_check.py where only text_data is of it."""
    device = "CPU"
    if config.device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device here: run this where there is one, or with "
                            "--smoke=True")
        device = torch.cuda.get_device_name()
    tree = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("nanogqa/*.py")]):
        tree.update(path.read_bytes())
    places = {}
    for part in PARTS:
        name = "gpu_check.py" if part == "check" else "gpu_speed.py"
        digest = tree.copy()
        digest.update((ROOT / "results" / name).read_bytes())
        places[part] = {"device": f"{device}, torch {torch.__version__}",
                        "tree": digest.hexdigest()[:12]}
    return places


def find(measured, row, place):
    """What was measured of a row at this place; None if nothing was."""
    for found in measured:
        same = found["name"] == row.name and found["settings"] == row.settings
        if same and place.items() <= found.items():
            return found
    return None


# -- the program -----------------------------------------------------------------------------------

@program
def main(argv):
    config = build(GpuConfig, parse(GpuConfig, argv, __doc__))
    deadline = time.monotonic() + 60 * config.minutes - 5
    out = Path(config.out_dir)
    places = places_of(config)
    check_writable(out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker too
    measured = load(out / "gpu.json")
    worker = None
    try:
        for row in plan(config):
            place = places[row.part]
            found = find(measured, row, place)
            if found is not None and not (config.again and has_failed(found["outcome"])):
                print(f"{row.name}: measured before")
                continue
            left = deadline - time.monotonic()
            needed = row.seconds
            if row.resumes:
                needed = min(needed, 300)  # it goes on from there, once it has timed its models
            if left < needed:
                print(f"{row.name}: skipped, it takes about {row.seconds:.0f} s and "
                      f"{max(0, left):.0f} s are left")
                continue
            worker = worker_for(row, worker, config, place)
            limit = 60 + 3 * row.seconds
            outcome = worker.measure(row, min(left, limit))
            if "error" in outcome:  # an error of CUDA stays with its process
                worker.end()
            print(f"{row.name}: {summary(outcome)}", flush=True)
            if "timeout" in outcome and (row.resumes or left < limit):
                continue  # the next call measures it
            measured = [other for other in measured if other is not found]
            measured.append(dict(part=row.part, name=row.name, settings=row.settings, **place,
                                 outcome=outcome, target=row.target, beside=row.beside))
            write_json(out / "gpu.json", {"rows": measured})
            write_tables(measured, out)
    finally:
        if worker is not None:
            worker.end()
    write_tables(measured, out)


def worker_for(row, worker, config, place):
    """The worker of the last row if it is alive and this row may share it, otherwise a new one."""
    name, backend = row.process, "inductor"
    if config.smoke:
        name = "smoke"
        if config.device == "cpu":
            backend = "aot_eager"  # traces as inductor does, and compiles nothing
    if worker is not None:
        if worker.name == name and worker.process.poll() is None:
            return worker
        worker.end()
    return Worker(Path(config.out_dir), place["tree"], name, backend)


def summary(outcome):
    """An outcome as one line."""
    if "error" in outcome:
        return f"failed: {outcome['error']}"
    if "checks" in outcome:
        return ", ".join(filter(None, check_cells(outcome)))
    words = []
    for key in COLUMNS:
        if outcome.get(key) is not None:
            words.append(f"{key} {outcome[key]:{COLUMNS[key]}}")
    return "  ".join(words)


def write_tables(measured, out):
    with replacing(out / "gpu.md") as file:
        file.write(tables(measured))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2])
    else:
        main()
