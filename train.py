"""Trains a GPT on tokenized text, on one device or, under torchrun, on several.

    python train.py [config.py ...] [--key=value ...]                              later settings win
    torchrun --standalone --nproc_per_node=4 train.py config/gpt2_124m.py config/gqa.py
"""
import contextlib
import ctypes
import datetime
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nanogqa import checkpoint
from nanogqa.configurator import UserError, build, parse, program, subset, world
from nanogqa.dataloader import Dataset, bits_per_byte, keyed, prepare_default, train_batch, val_batch, val_windows
from nanogqa.files import check_writable
from nanogqa.tokenizer import copy_tokenizer
from model import GPT, GPTConfig, initial_weight


@dataclass
class TrainConfig(GPTConfig):
    # files
    out_dir: str = "out"          # folder that receives ckpt.pt and metrics.jsonl
    overwrite: bool = False       # let a run from scratch replace the one in out_dir
    init_from: str = "scratch"    # scratch, resume, auto (resume if out_dir has a checkpoint), or a folder with weights
    dataset: str = "python"       # a folder below data/, or the path of a prepared one
    # length and evaluation
    max_steps: int = 1600         # optimizer steps in all
    eval_interval: int = 400      # steps between evaluations; each one saves a checkpoint
    eval_tokens: int | None = 2**16  # validation tokens, the same ones every time; None: the whole split
    keep_checkpoints: int = 0     # how many ckpt_STEP.pt stay, beside ckpt.pt (the newest) and ckpt_best.pt
    eval_only: bool = False       # evaluate the checkpoint in out_dir (or of init_from) and stop
    log_interval: int = 20        # steps between log lines
    profile: bool = False         # write out_dir/trace.json, a torch.profiler trace of 5 steps (open it in a trace viewer)
    trainable: str = ""           # train only the weights whose name holds this regular expression (q_proj|k_proj); "": all
    # many devices
    parallel: Literal["ddp", "fsdp"] = "ddp"  # a whole model on each, or its weights split over all (FSDP2)
    recompute: bool = False       # run each block again in the backward pass instead of keeping its activations
    # batch
    tokens_per_step: int = 2**11  # tokens per optimizer step over all devices and micro-steps
    batch_size: int | None = None  # sequences per device and micro-step; None: a device's share of the step at once
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: matrices of the blocks by Muon (Jordan 2024), the rest by AdamW
    learning_rate: float = 3e-3   # peak, after the warm-up
    min_lr: float = 0.0           # at max_steps, the end of the cosine
    warmup_steps: int = 100       # steps of linear warm-up; may be more than max_steps
    weight_decay: float = 0.1     # on matrices only
    beta1: float = 0.9            # decay of AdamW's mean gradient
    beta2: float = 0.95           # decay of AdamW's mean squared gradient
    grad_clip: float = 1.0        # largest norm of the whole gradient; 0 is no limit
    # where it runs
    seed: int = 1337              # of the weights, the order of the data and dropout
    device: str = "auto"          # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the products; weights stay float32. auto: bfloat16 on CUDA
    compile: Literal["auto", True, False] = "auto"  # torch.compile. auto: on CUDA
    # Weights & Biases
    wandb_log: bool = False       # also log to wandb (WANDB_MODE=offline needs no network)
    wandb_project: str = "nanogqa"  # project there
    wandb_run_name: str | None = None  # run there; None: out_dir

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_interval", "log_interval", "batch_size", "tokens_per_step", "eval_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_steps", "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "seed",
                     "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"trainable={self.trainable!r} is no regular expression ({error}): write one like q_proj|k_proj") from None
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.tokens_per_step % self.block_size:
            raise ValueError(f"tokens_per_step={self.tokens_per_step} is not a multiple of block_size={self.block_size}: "
                             f"the nearest is {nearest(self.tokens_per_step, self.block_size)}")


def nearest(value, unit):
    """The multiples of unit around value, in words."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else f"{above}"


# -- where it runs -----------------------------------------------------------------------------------------------------

@dataclass
class Runtime:
    """What the settings device, dtype and compile came to on this machine, and the place of this rank among others."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    why: str                      # one line that says so
    rank: int = 0
    ranks: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def tensor(self, array):
        return torch.from_numpy(array).to(self.device)

    def describe(self):
        """Plain values for a checkpoint."""
        return dict(device=self.device.type, dtype=str(self.dtype).removeprefix("torch."), compile=self.compile,
                    ranks=self.ranks)


# Decoding steps after which compiling has paid off: 12 layers of width 768 took 86 s to compile on two CPU cores, and a
# step then 16 ms instead of 20; smaller models gain less, and take as long for each layer. Not measured on CUDA.
DECODING_PAYS = 30_000


def pick_runtime(device, dtype, compile, decoding_steps=None):
    """The Runtime of the settings device, dtype and compile, each of which may be "auto", for training or that many steps of
    decoding. UserError if it is not here."""
    rank, ranks, local_rank = world()
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    why = []
    if device == "auto":
        device = next(kind for kind in here if here[kind])
        why.append(f"device {device} (no GPU found)" if device == "cpu" else f"device {device} (found)")
    else:
        why.append(f"device {device}")
    kind, colon, index = device.partition(":")
    if kind not in here or (colon and not (kind == "cuda" and index.isdecimal() and len(index) < 4)):
        raise UserError(f"there is no device {device!r}: choose auto, cpu, cuda, cuda:N or mps")
    if not here[kind]:
        raise UserError(f"device {device!r} is not available here: choose --device=auto or --device=cpu")
    if kind == "cuda":
        index = local_rank if ranks > 1 or not index else int(index)
        if index >= torch.cuda.device_count():
            raise UserError(f"there is no GPU {index}, this machine has {torch.cuda.device_count()}: start at most as many "
                            "ranks as GPUs, or choose --device=cpu")
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    if dtype == "auto":
        half = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if half else "float32"
        why.append(f"{dtype} ({'this GPU has it' if half else 'auto takes bfloat16 on GPUs that have it'})")
    else:
        why.append(dtype)
    if compile == "auto" and decoding_steps is not None:
        compile = decoding_steps >= DECODING_PAYS
        why.append(f"compiled ({decoding_steps:,} steps pay for it)" if compile else
                   f"eager (compiling pays from {DECODING_PAYS:,} steps on)")
    elif compile == "auto":
        compile = kind == "cuda"
        why.append("compiled" if compile else f"eager (on {kind} a short run ends before compiling has paid off)")
    else:
        why.append("compiled" if compile else "eager")
    return Runtime(torch.device(device), getattr(torch, dtype), compile, ", ".join(why), rank, ranks)


def compile_model(model, runtime, example):
    """model compiled, after a try on example(model); or model itself, with one warning, where compiling fails."""
    if not runtime.compile:
        return model
    compiled = torch.compile(model)
    try:
        example(compiled)
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no Triton, an unsupported Python: many kinds
        warn_eager(error, runtime)
        return model


def warn_eager(error, runtime):
    """Says, once, that compiling has failed and why."""
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    if runtime.rank == 0:
        print(f"warning: torch.compile does not work here ({reason[:200]}): going on in eager mode", file=sys.stderr)
    runtime.compile = False


# peak dense bfloat16 FLOP/s by a part of the device's name (NVIDIA's data sheets), for model FLOPs utilisation
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(runtime):
    """The peak FLOP/s of one device in bfloat16; None where it is not known."""
    if runtime.device.type != "cuda" or runtime.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(runtime.device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


# -- from settings to a checked plan -----------------------------------------------------------------------------------

SKIPS = 10  # steps in a row without a finite gradient after which a run gives up
CALL = {"out_dir", "init_from", "overwrite", "eval_only", "profile"}  # settings of one call, which no checkpoint keeps


def plan(given):
    """The checked (TrainConfig, Dataset, checkpoint to start from or None) of the settings that were given.

    When resuming, what is not given is what the run had; from another run's weights only the model is.
    """
    call = build(TrainConfig, {key: given[key] for key in given if key in CALL})  # the rest may need the checkpoint's
    out_dir, init_from = call.out_dir, call.init_from
    there = checkpoint.find(call.out_dir).exists() or bool(checkpoint.find_sharded(call.out_dir))
    if init_from == "auto":
        init_from = "resume" if there else "scratch"
    resume = init_from == "resume"
    if there and not (resume or call.overwrite or call.eval_only):
        raise UserError(f"{out_dir} holds a checkpoint: continue it with --init_from=resume, replace it with "
                        "--overwrite=True, or choose another --out_dir")
    if call.eval_only and init_from == "scratch":
        raise UserError("eval_only needs weights: add --init_from=resume, or --init_from=FOLDER with another run's checkpoint")
    state, base, source = None, {}, out_dir if resume else init_from
    if init_from != "scratch":
        if not Path(source).exists():
            raise UserError(f"{source} is no folder: init_from takes scratch, resume, auto, a folder that holds a checkpoint, or "
                            "the path of a ckpt_STEP.pt")
        state = checkpoint.load(source, GPTConfig)
        if resume and not state["settings"]:
            raise UserError(f"{source} holds converted weights and no run to resume: pass it as --init_from={source}, with "
                            "another --out_dir")
        # first what was given, or what follows from it would be named
        check_same_model({key: value for key, value in given.items() if value is not None}, state["config"], source, resume)
        base = {**state["config"], **(checkpoint.typed(TrainConfig, state["settings"], source) if resume else {})}
    config = build(TrainConfig, {**base, **given, "init_from": init_from})

    prepare_default(config.dataset, world()[2])
    dataset = Dataset(config.dataset)
    meta = dataset.meta
    if config.vocab_size is None:
        config.vocab_size = meta["vocab_size"] if state is None else state["config"]["vocab_size"]
    if state is not None:
        check_same_model(asdict(config), state["config"], source, resume)
        if state["tokenizer"] not in (meta["tokenizer"], "none"):
            same = source if state["tokenizer"].startswith("tokenizer.json") else state["tokenizer"]
            raise UserError(f"data set {config.dataset!r} is of tokenizer {meta['tokenizer']!r}, the model in {source} of "
                            f"{state['tokenizer']!r}: prepare the data with --tokenizer={same}")
    if resume:
        for name in ("seed", "tokens_per_step"):
            if getattr(config, name) != base.get(name):
                raise UserError(f"{name}={getattr(config, name)}, but the run in {out_dir} has {base.get(name)}: leave {name} "
                                "out, or start another run with another --out_dir")
        if meta["sha256"] != state["dataset_sha256"]:
            raise UserError(f"data set {config.dataset!r} is not the one that the run in {out_dir} was trained on (another "
                            "sha256): prepare that one again, or start another run with another --out_dir")
        if state["step"] > config.max_steps:
            raise UserError(f"the run in {out_dir} is at step {state['step']}, beyond max_steps={config.max_steps}: raise it")
    if config.parallel == "fsdp" and config.optimizer == "muon":
        raise UserError("parallel=fsdp splits the matrices that Muon needs whole: choose --optimizer=adamw or --parallel=ddp")
    if config.parallel == "fsdp" and world()[1] == 1:
        raise UserError("parallel=fsdp splits a model over ranks, and there is one: start with torchrun, or choose --parallel=ddp")
    if config.parallel == "fsdp" and importlib.util.find_spec("safetensors") is None:
        raise UserError("parallel=fsdp writes its checkpoints by safetensors, which is not installed: pip install safetensors")
    if meta["vocab_size"] > config.vocab_size:
        raise UserError(f"data set {config.dataset!r} has {meta['vocab_size']} token ids, more than vocab_size="
                        f"{config.vocab_size}: raise vocab_size, or leave it out")
    for split in (dataset.train, dataset.val):
        if split.n_tokens <= config.block_size:
            raise UserError(f"block_size={config.block_size} needs {config.block_size + 1} tokens in each split, data set "
                            f"{config.dataset!r} has one of {split.n_tokens}: lower block_size, or use more text")
    return config, dataset, state


def check_same_model(values, before, source, resume):
    """UserError where a setting of the model in values is not that of the checkpoint in source, before."""
    for name in before:  # in the order of GPTConfig
        if values.get(name, before[name]) != before[name] and (resume or name not in ("block_size", "dropout")):
            raise UserError(f"{name}={values[name]}, but the model in {source} has {before[name]}: leave {name} out, or start "
                            "from scratch in another --out_dir")


def batch_shape(config, ranks):
    """(batch_size, gradient accumulation): sequences per micro-step, and micro-steps per optimizer step, of each rank."""
    at_once = (config.batch_size or 1) * ranks * config.block_size
    if config.tokens_per_step % at_once:
        raise UserError(f"tokens_per_step={config.tokens_per_step} is not a multiple of batch_size {config.batch_size or 1} x "
                        f"{ranks} ranks x block_size {config.block_size} = {at_once}: the nearest is "
                        f"{nearest(config.tokens_per_step, at_once)}, or choose another batch_size")
    accumulation = config.tokens_per_step // at_once
    return (config.batch_size, accumulation) if config.batch_size else (accumulation, 1)


# -- evaluation, optimizer, log --------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, split, config, runtime, batch_size):
    """Mean loss in nats per token over the fixed validation windows, whatever the number of ranks."""
    model.eval()
    starts = val_windows(split, config.block_size, config.eval_tokens)
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of tokens
    for first in range(0, len(starts), runtime.ranks * batch_size):  # as often on each rank: FSDP ranks run together
        first += runtime.rank * batch_size
        x, y = val_batch(split, starts[first:first + batch_size], batch_size, config.block_size)
        with runtime.autocast():
            loss = model(runtime.tensor(x), runtime.tensor(y), logits="none")[1]
        if n_tokens := int((y >= 0).sum()):
            total += torch.tensor([loss.item() * n_tokens, n_tokens], dtype=torch.float64)
    model.train()
    if runtime.ranks > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def check_finite(finite, what, step, config, runtime):
    """UserError unless finite: no bad weights reach a checkpoint."""
    if not finite:
        raise UserError(f"the {what} at step {step} is not finite (lr {learning_rate(max(0, step - 1), config):.2e}, "
                        f"{runtime.describe()['dtype']}): lower learning_rate and go on from the last good checkpoint with "
                        "--init_from=resume")


def finite(value):
    """value, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def learning_rate(step, config):
    """Of the update that follows step updates: linear warm-up, then a cosine from learning_rate to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def make_optimizer(model, config):
    """The optimizer of the setting of that name; weight decay on matrices, not on norms and biases."""
    blocks = [p for p in model.layers.parameters() if p.requires_grad and p.dim() >= 2] if config.optimizer == "muon" else []
    inside = {id(p) for p in blocks}
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2 and id(p) not in inside]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    return adamw if not blocks else MuonAndAdamW(blocks, adamw, config)


class MuonAndAdamW:
    """torch.optim.Muon for the matrices of the blocks beside AdamW for the rest, as one optimizer with one learning rate."""

    def __init__(self, blocks, adamw, config):
        # match_rms_adamw scales an update to the size of AdamW's, so that one learning rate serves both
        muon = torch.optim.Muon(blocks, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = muon, adamw

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        """As one optimizer's: parameters are numbered through both parts."""
        muon, adamw = (part.state_dict() for part in self.parts)
        n = sum(len(group["params"]) for group in muon["param_groups"])
        groups = [dict(group, params=[i + n for i in group["params"]]) for group in adamw["param_groups"]]
        return dict(state=muon["state"] | {i + n: x for i, x in adamw["state"].items()}, param_groups=muon["param_groups"] + groups)

    def load_state_dict(self, state):
        n = sum(len(group["params"]) for group in self.parts[0].param_groups)
        for part, shift, last in zip(self.parts, (0, n), (n, math.inf)):
            part.load_state_dict(dict(state={i - shift: x for i, x in state["state"].items() if shift <= i < last},
                                      param_groups=part.state_dict()["param_groups"]))


class Times:
    """Where a run's time goes: lap(phase) charges the time since the last lap to phase. On CUDA by events, which do not wait."""

    def __init__(self, runtime):
        self.cuda, self.seconds, self.marks = runtime.device.type == "cuda", {}, []
        self.lap("")

    def lap(self, phase):
        mark = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self.marks.append((phase, mark))
        if len(self.marks) > 1000:
            self.add_up()

    def add_up(self):
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (phase, mark) in zip(self.marks, self.marks[1:]):
            seconds = before.elapsed_time(mark) / 1e3 if self.cuda else mark - before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.marks = self.marks[-1:]

    def __str__(self):
        self.add_up()
        whole = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{phase} {seconds:.1f} s ({seconds / whole:.0%})" for phase, seconds in self.seconds.items())


class Log:
    """metrics.jsonl, lines on the terminal (below them a progress bar, where it is one) and wandb. Rank 0 alone has one."""

    def __init__(self, config, start):
        """Keeps the rows up to step start, -1 for none: what a killed run wrote after its last checkpoint comes again."""
        self.wandb = None
        if config.wandb_log:
            try:
                import wandb
                self.wandb = wandb.init(project=config.wandb_project, name=config.wandb_run_name or config.out_dir,
                                        dir=config.out_dir, config=asdict(config))
            except Exception as error:  # not installed, not logged in, no network
                raise UserError(f"wandb does not start ({' '.join(str(error).split())[:200]}): log in with wandb login, set "
                                "WANDB_MODE=offline, or leave wandb_log out") from None
        self.path = Path(config.out_dir) / "metrics.jsonl"
        rows = []
        if start >= 0 and self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a line cut short, say
                    rows += [line] if json.loads(line)["step"] <= start else []
        part = self.path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in rows))
        os.replace(part, self.path)
        self.bar = tqdm(total=config.max_steps, initial=max(0, start), desc=config.out_dir, unit="step", disable=None)

    def row(self, **row):
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log({key: value for key, value in row.items() if value is not None}, step=row["step"])
        self.bar.update(row["step"] - self.bar.n)
        text = f"step {row['step']:>6}"
        for key, form in (("train_loss", ".4f"), ("val_loss", ".4f"), ("val_bpb", ".4f"), ("lr", ".2e"), ("grad_norm", ".2f"),
                          ("tokens_per_sec", ",.0f"), ("mfu", ".1%")):
            if row[key] is not None:
                text += f"  {key} {row[key]:{form}}"
        text += f"  {row['skipped']} steps skipped, their gradients not finite" if row["skipped"] else ""
        self.print(text)

    def print(self, text):
        self.bar.write(text)
        sys.stdout.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


class StopSignal:
    """While it is open, Ctrl-C and SIGTERM set .number: the loop stops at the next step boundary. A second Ctrl-C ends it."""

    def __enter__(self):
        self.number, self.parent = 0, os.getppid()
        self.before = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number, frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def __exit__(self, *error):
        if not self.number or any(error):  # else not before the end is told: a killed agent makes a signal for each of its threads
            self.restore()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, runtime):
        """The signal that any rank has received: ranks receive it at different moments, and must stop at the same step."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            self.number = self.number or signal.SIGTERM  # torchrun was killed and cannot pass one on
        if runtime.ranks == 1:
            return self.number
        number = torch.tensor(self.number)
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU, so that the GPU is not waited for
        return number.item()


# -- the run -----------------------------------------------------------------------------------------------------------

@program
def main(argv):
    given = parse(TrainConfig, argv, __doc__)
    call = build(TrainConfig, {key: given[key] for key in given if key in CALL})
    ranks = world()[1]
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            join_ranks()
            stack.callback(dist.destroy_process_group)
        locked = Path(call.out_dir).is_dir() and not call.eval_only
        if locked:  # before the checkpoint is read, which a run that is about to end may still write
            own(call.out_dir, stack)
        config, dataset, state = plan(given)
        runtime = pick_runtime(config.device, config.dtype, config.compile)
        batch_size, accumulation = batch_shape(config, runtime.ranks)
        if not config.eval_only:
            check_writable(config.out_dir)
            if not locked:
                own(config.out_dir, stack)
            copy_tokenizer(dataset.meta["tokenizer"], dataset.folder, config.out_dir)
        if config.parallel == "fsdp":
            model = sharded_model(config, runtime, state)
        elif state is None:
            model = checkpoint.new_model(GPT, subset(GPTConfig, config), config.seed)
        else:
            model = checkpoint.load_model(GPT, subset(GPTConfig, config), state)
        model.recompute = config.recompute
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(config.trainable, name) is not None)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"no weight is called like trainable={config.trainable!r}: look at the names in model.py, q_proj for "
                            "instance")
        model.to(runtime.device)
        try:
            train(config, model, dataset, state, runtime, batch_size, accumulation)
        except torch.OutOfMemoryError:
            raise UserError(f"the device is out of memory: lower batch_size (now {batch_size}; tokens_per_step may stay) or "
                            "block_size") from None
        except RuntimeError as error:
            if ranks > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise UserError("another rank of this run has ended, so this one ends too and saves nothing: start all again with "
                                "--init_from=auto") from None
            raise


def join_ranks():
    """Makes the process group. After a restart by torchrun its store still holds the addresses of the ranks that died, which
    torch 2.13 lets the new ones read; so each attempt has names of its own, where one agent counts attempts for all."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no rank waits for a torchrun that was killed
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then it has been there before us
    try:
        store, rank, ranks = next(rendezvous("env://", timeout=datetime.timedelta(seconds=10 if by_agent else 600)))
    except dist.DistError:
        raise UserError(f"nobody answers at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where the ranks meet: start all "
                        "of them again") from None
    store.set_timeout(datetime.timedelta(minutes=10))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=ranks)


def own(out_dir, stack):
    """Locks out_dir until stack closes: rank 0 does, the others wait for it."""
    if world()[0] == 0:
        stack.enter_context(checkpoint.lock(out_dir))
    if world()[1] > 1:
        dist.all_reduce(torch.zeros(()))


@torch.no_grad()
def sharded_model(config, runtime, state):
    """The model with the weights of each block split over the ranks (FSDP2): at no time is it whole on a device."""
    with torch.device("meta"):
        model = GPT(subset(GPTConfig, config))
    mesh = init_device_mesh(runtime.device.type, (runtime.ranks,))
    half = runtime.dtype != torch.float32
    # cos and sin come in as float32 and stay so; gradients are summed in float32
    policy = MixedPrecisionPolicy(runtime.dtype if half else None, torch.float32 if half else None, cast_forward_inputs=False)
    for block in model.layers:
        if runtime.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=runtime.device)
    weights = state["model"] if state else {}
    if not state or weights:  # what a sharded checkpoint holds is read by load_sharded
        for name, parameter in model.named_parameters():
            whole = weights[name] if weights else initial_weight(name, parameter.shape, config.seed)
            parameter.copy_(checkpoint.placed(whole, parameter))
    return model


def train(config, model, dataset, state, runtime, batch_size, accumulation):
    """Runs the plan: evaluates and stops, or trains from state (a checkpoint, or None) to max_steps."""
    keep_freed_memory()
    master, ranks = runtime.rank == 0, runtime.ranks
    say = print if master else lambda *args: None
    resume = config.init_from == "resume"
    start = state["step"] if resume else 0
    optimizer = make_optimizer(model, config)
    fsdp = config.parallel == "fsdp"
    if resume and state["model"]:
        checkpoint.load_optimizer(optimizer, state)
    elif state and not state["model"]:
        checkpoint.load_sharded(config.out_dir, model, optimizer, state)

    def batch(step, micro_step):
        """Inputs and targets of this rank: the ranks take turns through the sequences of the step."""
        first = ((step * accumulation + micro_step) * ranks + runtime.rank) * batch_size
        x, y = train_batch(dataset.train, config.seed, first, batch_size, config.block_size)
        return runtime.tensor(x), runtime.tensor(y)

    def loss_of(forward, x, y):
        with runtime.autocast():
            return forward(x, y, logits="none")[1]

    # one order: the plain model owns the weights and is saved, torch.compile wraps it, DDP wraps that (FSDP is inside it)
    compiled = model if fsdp else compile_model(model, runtime, lambda forward: loss_of(forward, *batch(0, 0)).backward())
    optimizer.zero_grad(set_to_none=True)
    ddp = DistributedDataParallel(compiled, gradient_as_bucket_view=True) if ranks > 1 and not fsdp else compiled

    for line in announcement(config, model, dataset, state, runtime, batch_size, accumulation):
        say(line)
    if config.eval_only:
        val_loss = evaluate(compiled, dataset.val, config, runtime, batch_size)
        return say(f"val_loss {val_loss:.4f}, {bits_per_byte(val_loss, dataset.val):.4f} bits per byte")

    redo = resume and start == config.max_steps and state["val_loss"] is None  # stopped at its last step, not evaluated
    kept = -1 if not resume else start - 1 if redo else start  # the last step whose row in the log stays
    log = Log(config, kept) if master else None
    peak, flops = peak_flops(runtime), model.flops_per_token(config.block_size)
    began = interval_began = time.perf_counter()
    interval_step = start                       # the step at which this interval of the clock began
    loss = grad_norm = val_loss = None
    best = state["best_val_loss"] if resume else None
    skipped, in_a_row = 0, 0                    # steps whose gradient was not finite: since the last log line, and up to now
    if not resume and not config.eval_only:
        checkpoint.clear_sharded(config.out_dir, runtime.rank)
    saver = (checkpoint.ShardedSaver if fsdp else checkpoint.Saver)(config.out_dir, config.keep_checkpoints, runtime.rank)

    times, tracing = Times(runtime), profiler(config) if master and config.profile else contextlib.nullcontext()
    with StopSignal() as stop, log or contextlib.nullcontext(), tracing:
        for step in range(start, config.max_steps + 1):  # step updates are done
            last = step == config.max_steps
            stopping = stop.agreed(runtime)
            new = step > start or not resume or redo  # not yet logged and saved
            evaluating = new and (last or step % config.eval_interval == 0)
            logging = new and (evaluating or step % config.log_interval == 0)

            if logging:
                if loss is not None:
                    if ranks > 1:
                        dist.all_reduce(loss, dist.ReduceOp.SUM)
                    loss = loss.item() / ranks  # waits for the device, so that the clock below is honest
                seconds = time.perf_counter() - interval_began
                rate = (step - interval_step) * config.tokens_per_step / seconds if step > interval_step else None
                val_loss = evaluate(compiled, dataset.val, config, runtime, batch_size) if evaluating else None
                check_finite(math.isfinite(val_loss or 0.0), "validation loss", step, config, runtime)
                best = min(best or math.inf, val_loss) if evaluating else best
                if master:
                    log.row(step=step, tokens=step * config.tokens_per_step, train_loss=finite(loss), val_loss=val_loss,
                            val_bpb=bits_per_byte(val_loss, dataset.val) if evaluating else None,
                            lr=learning_rate(step - 1, config) if step else None,
                            grad_norm=finite(grad_norm.item()) if step > start else None, tokens_per_sec=rate,
                            mfu=rate * flops / (peak * ranks) if rate and peak else None, skipped=skipped)
                skipped = 0
            if evaluating or (stopping and new) or (logging and saver.failed):
                check_finite(all(p.isfinite().all() for p in local(model)), "model", step, config, runtime)
                saver.save(contents(config, model, optimizer, step, val_loss if evaluating else None, best, dataset, runtime), last)
            if logging:
                interval_began, interval_step = time.perf_counter(), step
                times.lap("evaluation, log and checkpoints")
            if last or stopping:
                break

            lr = learning_rate(step, config)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            loss = torch.zeros((), device=runtime.device)
            for micro_step in range(accumulation):
                x, y = batch(step, micro_step)
                times.lap("data")
                if config.dropout:              # drawn by place in the global batch, so that a resumed run draws the same
                    torch.manual_seed(keyed(config.seed, step, micro_step * ranks + runtime.rank))
                synchronize = ranks == 1 or fsdp or micro_step == accumulation - 1
                with contextlib.nullcontext() if synchronize else ddp.no_sync():  # around forward and backward
                    micro_loss = loss_of(ddp, x, y) / accumulation
                    micro_loss.backward()
                loss += micro_loss.detach()
                times.lap("forward and backward")
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            grad_norm = grad_norm.full_tensor() if fsdp else grad_norm
            if grad_norm.isfinite():            # of the averaged gradient: all ranks skip a step, or none
                optimizer.step()
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                check_finite(in_a_row < SKIPS, f"gradient ({SKIPS} steps in a row)", step + 1, config, runtime)
            optimizer.zero_grad(set_to_none=True)
            times.lap("optimizer")
            if master and config.profile:
                tracing.step()

    saver.wait()
    if saver.failed:
        raise UserError(f"{saver.failed}: go on with --init_from=auto")
    if stopping and not last:
        say(f"stopped by {signal.Signals(stopping).name} after step {step} and saved: the same command with "
            "--init_from=resume goes on")
        stop.restore()
        raise SystemExit(128 + stopping)
    minutes, seconds = divmod(time.perf_counter() - began, 60)
    val_loss = state["val_loss"] if val_loss is None else val_loss  # resumed where it had ended
    say(f"done in {minutes:.0f} min {seconds:.0f} s: val_loss {val_loss:.4f}, {bits_per_byte(val_loss, dataset.val):.4f} bits "
        "per byte")
    say(f"time: {times}")
    prompt = "def " if dataset.meta.get("python") else ""
    say(f'now try: python sample.py --out_dir={config.out_dir} --prompt="{prompt}"')


def local(model):
    """The parameters of model, or this rank's parts of them."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def profiler(config):
    """Traces 5 steps, from the sixth on, into out_dir/trace.json."""
    return torch.profiler.profile(schedule=torch.profiler.schedule(wait=4, warmup=1, active=5, repeat=1), with_stack=True,
                                  on_trace_ready=lambda trace: trace.export_chrome_trace(f"{config.out_dir}/trace.json"))


def keep_freed_memory():
    """Lets glibc keep the large blocks that a step frees for the next step, instead of handing them back to Linux and asking
    for them again, page by page: half of the time of a large loss head on a CPU."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 2**30)      # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def announcement(config, model, dataset, state, runtime, batch_size, accumulation):
    """Lines that say what is about to happen, and what a resumed run does otherwise than before."""
    def count(n, noun):
        return f"{n:,} {noun}{'' if n == 1 else 's'}"
    meta, epochs = dataset.meta, config.tokens_per_step * config.max_steps / dataset.train.n_tokens
    yield f"{runtime.why}; {count(runtime.ranks, 'rank')}"
    yield (f"model: {model.num_params():,} parameters ({model.num_params(embedding=False):,} without the embedding table), "
           f"{config.heads}, KV cache {model.kv_bytes_per_token():,} bytes per token in float32")
    yield (f"data: {config.dataset}, {dataset.train.n_tokens:,} training tokens, tokenizer {meta['tokenizer']}, "
           f"sha256 {meta['sha256'][:16]}")
    yield (f"batch: {config.tokens_per_step:,} tokens per step = {count(batch_size, 'sequence')} x {config.block_size} tokens x "
           f"{count(runtime.ranks, 'rank')} x {count(accumulation, 'micro-step')}; {count(config.max_steps, 'step')} = "
           f"{epochs:.2f} epochs")
    if config.init_from == "resume":
        then, now = {**state["settings"], **state["runtime"]}, {**run_settings(config), **runtime.describe()}
        changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        yield f"resuming at step {state['step']}" + (", changed: " + ", ".join(changed) if changed else "")


def run_settings(config):
    """What a resumed run goes on with beside its model."""
    left_out = CALL | {f.name for f in fields(GPTConfig)}
    return {key: value for key, value in asdict(config).items() if key not in left_out}


def contents(config, model, optimizer, step, val_loss, best_val_loss, dataset, runtime):
    """What the checkpoint of this step holds: see checkpoint.KEYS."""
    return dict(model=model.state_dict(), config=asdict(model.config), optimizer=optimizer.state_dict(),
                settings=run_settings(config), runtime=runtime.describe(), step=step, val_loss=val_loss,
                best_val_loss=best_val_loss, tokenizer=dataset.meta["tokenizer"], dataset_sha256=dataset.meta["sha256"])


if __name__ == "__main__":
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # threads of the process group outlive it: now and then they abort an interpreter that is being taken down, or wait for
        # its lock while it waits for them
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
