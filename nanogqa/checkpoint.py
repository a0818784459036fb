"""Checkpoints: a file of tensors and plain values, replaced as a whole, read without running code.

The classes GPT and GPTConfig, which this package does not import, are passed in.
"""
import contextlib
import math
import os
import re
import shutil
import sys
import threading
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import filelock  # torch depends on it
import torch
import torch.distributed.checkpoint as dcp

from nanogqa import schema
from nanogqa.batches import batch_shape
from nanogqa.configurator import (
    UserError,
    build,
    check_key,
    convert,
    one_line,
    out_of_memory,
    subset,
)
from nanogqa.costs import SHAPE, count_params
from nanogqa.distributed import barrier, check_parallel, local, placed, total, whole, world
from nanogqa.files import check_writable, created, replacing, sync, write_json
from nanogqa.runtime import check_memory, check_training
from nanogqa.tokenizer import HF_CONFIG, HF_TOKENIZER, copy_tokenizer, present_name

NAME = "ckpt.pt"      # the newest checkpoint
BEST = "ckpt_best.pt"  # the one with the lowest validation loss
# sharded_STEP is a folder of safetensors; state.json in it is written last
SHARDED = "sharded_"
REQUIRED = object()


def plain_value(value):
    """Text, a number that fits into 64 bits, True, False or None."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, (str, float))


def dense_float_tensor(value):
    """A tensor of ordinary numbers on the CPU that all have a place of their own in memory."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_nested:
        return False
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    reach = 1  # numbers from the first to the last one of the dimensions so far
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * (size - 1) + 1)
    return value.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def loss(value):
    """A finite number or None."""
    return value is None or schema.number(value)


def short_text(value):
    return isinstance(value, str) and len(value) < 200 and value.isprintable()


# what a checkpoint holds: the schema of each entry, and its value where an older file lacks it
KEYS = {
    "model": ({str: dense_float_tensor}, REQUIRED),  # the model's state dict
    "config": ({str: plain_value}, REQUIRED),        # of GPTConfig
    "optimizer": (dict, REQUIRED),                   # "state": moments by the parameter's name
    "settings": ({str: plain_value}, REQUIRED),      # of train.py except the model's; not resolved
    "runtime": ({str: plain_value}, REQUIRED),       # the resolved device, dtype, compile, ranks
    "step": (schema.count, REQUIRED),                # optimizer steps done
    "val_loss": (loss, None),                        # nats per token, if this step was evaluated
    "best_val_loss": (loss, None),                   # the lowest of the run so far
    "tokenizer": (short_text, REQUIRED),             # a name for tokenizer.get_tokenizer
    "dataset_sha256": (short_text, REQUIRED),        # of meta.json; empty: not trained here
}

# the moments that an optimizer keeps of a parameter: True where they have its shape
MOMENTS = {
    torch.optim.AdamW: {"step": False, "exp_avg": True, "exp_avg_sq": True},
    torch.optim.Muon: {"momentum_buffer": True},
}
# settings of one call, which no checkpoint keeps
PER_CALL = {"out_dir", "init_from", "overwrite", "eval_only", "profile"}


# -- writing ---------------------------------------------------------------------------------------

def save(out_dir, state, also=()):
    """Writes state, a dict of KEYS, as out_dir's checkpoint, and under the names in also.

    OSError leaves the previous files as they were.
    """
    out_dir = Path(out_dir)
    try:
        with replacing(out_dir / NAME, "wb") as file:
            torch.save(state, file)
            sync(file)
            for name in also:
                link(file.name, out_dir / name)
    except RuntimeError as error:  # torch's own error where the disk is full
        raise OSError(0, one_line(error, 100)) from None


def link(source, path):
    """Gives the file source a second name, which replaces what had it."""
    part = Path(f"{path}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, part)
    os.replace(part, path)


class Saver:
    """Writes checkpoints in a thread, so that training does not wait for the disk.

    ckpt.pt is the newest, ckpt_best.pt that of the lowest validation loss, ckpt_STEP.pt are the
    last keep ones. A failed write prints a warning; .failed holds it until one succeeds.
    """

    def __init__(self, config, rank=0):
        self.out_dir = Path(config.out_dir)
        self.keep = config.keep_checkpoints
        self.rank = rank
        self.kept = []  # steps of the ckpt_STEP.pt that this run has written
        if config.init_from == "resume":
            self.kept = numbered(self.out_dir, "ckpt_", ".pt")
        self.thread = None
        self.failed = None

    def save(self, state, last=False):
        """Returns once state is copied to host memory. All ranks call it, rank 0 writes."""
        self.wait()
        state = host_copy(state, self.rank == 0)
        if self.rank == 0:
            self.thread = threading.Thread(target=self.write, args=[state])
            self.thread.start()

    def write(self, state):
        also = []
        if state["val_loss"] is not None and state["val_loss"] == state["best_val_loss"]:
            also.append(BEST)
        if self.keep:
            also.append(f"ckpt_{state['step']}.pt")
        try:
            save(self.out_dir, state, also)
            self.failed = None
            self.remove_old(state["step"])
        except OSError as error:
            size = math.ceil(sum(x.nbytes for x in tensors(state)) / 2**20)
            self.fail(f"cannot save step {state['step']} to {self.out_dir} ({error.strerror}): "
                      f"make {size:,} MiB of room; {self.previous()}")

    def previous(self):
        """What is left after a failed write, as text."""
        if (self.out_dir / NAME).exists():
            return "the previous checkpoint is whole"
        return "nothing is saved yet"

    def remove_old(self, step):
        """Keeps the last ckpt_STEP.pt files of this run only; step is the newest."""
        if self.keep:
            # a killed run may have kept later steps: they are old once this one has passed them
            self.kept = sorted({step, *self.kept})
            passed = self.kept[:self.kept.index(step) + 1]
            for old in passed[:-self.keep]:
                with contextlib.suppress(OSError):  # the checkpoint is saved all the same
                    (self.out_dir / f"ckpt_{old}.pt").unlink()
                self.kept.remove(old)

    def fail(self, message):
        self.failed = message
        if self.rank == 0:
            print(f"warning: {message}, and the next log line tries again", file=sys.stderr,
                  flush=True)

    def wait(self):
        """Returns once nothing is being written."""
        if self.thread is not None:
            self.thread.join()


def host_copy(value, wanted=True):
    """A copy of nested dicts and lists with every tensor whole and in host memory.

    All ranks call it, as each holds a part of a split tensor. Where wanted is False, tensors
    become None.
    """
    if isinstance(value, torch.Tensor):
        value = whole(value)
        return value.detach().to("cpu", copy=True) if wanted else None
    if isinstance(value, dict):
        return {key: host_copy(x, wanted) for key, x in value.items()}
    if isinstance(value, list):
        return [host_copy(x, wanted) for x in value]
    return value


def tensors(value):
    """All tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors(x)


class ShardedSaver(Saver):
    """Each rank writes its part, as safetensors. The end of a run writes an ordinary ckpt.pt."""

    def save(self, state, last=False):
        if last:
            super().save(state)
            self.wait()
            if not self.failed:
                clear_sharded(self.out_dir, self.rank)
            return
        folder = self.out_dir / f"{SHARDED}{state['step']}"
        parts, plain = split(state)
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch may still change this interface
                dcp.save(parts, storage_writer=writer)
            if self.rank == 0:
                write_json(folder / "state.json", plain)  # last: it marks the folder as complete
            failed = None
        except (dcp.api.CheckpointException, OSError) as error:
            failed = (f"cannot save step {state['step']} to {folder} ({one_line(error)}): make "
                      "room")
        # a rank may fail alone, but the next attempt is one of all ranks
        if total(float(failed is not None)):
            self.fail(failed or "another rank cannot save its part")
        else:
            self.failed = None
            clear_sharded(self.out_dir, self.rank, keep=folder)


def split(state):
    """(tensors by flat names, plain values) of a state. AdamW's step counts are plain values."""
    parts = {f"model.{name}": x for name, x in state["model"].items()}
    steps = {}
    for name, moments in state["optimizer"]["state"].items():
        parts[f"exp_avg.{name}"] = moments["exp_avg"]
        parts[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        steps[name] = float(moments["step"])
    return parts, state | {"model": {}, "optimizer": steps}


def clear_sharded(out_dir, rank, keep=None):
    """Removes the sharded checkpoints in out_dir, except the folder keep."""
    if rank == 0:
        for step in numbered(out_dir, SHARDED):
            folder = Path(out_dir) / f"{SHARDED}{step}"
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)


def make_saver(config, rank):
    """The Saver of a run. A run from scratch removes the sharded checkpoints of the one before."""
    if config.init_from != "resume":
        clear_sharded(config.out_dir, rank)
    kind = ShardedSaver if config.parallel == "fsdp" else Saver
    return kind(config, rank)


# -- the folder ------------------------------------------------------------------------------------

# what opening the folder of a run creates in it
OPENED = {".lock", HF_TOKENIZER, HF_CONFIG}
# what a killed run may leave
LEFT = re.compile(r"(ckpt(_best|_\d+)?\.pt|metrics\.jsonl|trace\.json|wandb\.json)\.part|"
                  r"\.probe\d+")


def numbered(out_dir, before, after=""):
    """The numbers N of the files and folders BEFORE N AFTER in out_dir, in order.

    Other names, such as ckpt_007.pt or sharded_backup, are not of a run.
    """
    name = re.compile(re.escape(before) + r"(0|[1-9]\d{0,17})" + re.escape(after))
    found = []
    for path in Path(out_dir).iterdir():
        match = name.fullmatch(path.name)
        if match:
            found.append(int(match[1]))
    return sorted(found)


@contextlib.contextmanager
def lock(out_dir, patience=60):
    """While it is open, no other process holds lock(out_dir). UserError after patience seconds.

    If nothing but OPENED was added to the folder in the end, that is removed.
    """
    before = set(os.listdir(out_dir))
    held = filelock.FileLock(Path(out_dir) / ".lock")  # released with the process, however it ends
    try:
        held.acquire(timeout=patience, poll_interval=0.2)
    except filelock.Timeout:
        raise UserError(f"another run writes to {out_dir}: wait until it has ended, or choose "
                        "another --out_dir") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # someone has removed the folder
            added = set(os.listdir(out_dir)) - before
            if added <= OPENED:
                for name in added:
                    (Path(out_dir) / name).unlink()
        held.release()


def own(out_dir, stack):
    """Locks out_dir until stack closes: rank 0 does, the others wait for it."""
    if world()[0] == 0:
        stack.enter_context(lock(out_dir))
    barrier()


def open_folder(out_dir, dataset, locked, stack):
    """Creates and locks the folder of a run, and copies the data set's tokenizer into it."""
    if world()[0] == 0:
        stack.enter_context(created(out_dir))
    if not locked:
        own(out_dir, stack)
    if world()[0] == 0:
        remove_left(out_dir)
    check_writable(out_dir)
    copy_tokenizer(dataset.meta["tokenizer"], dataset.folder, out_dir)


def remove_left(out_dir):
    """Removes what killed runs have left. The folder is locked."""
    for path in Path(out_dir).iterdir():
        if LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)  # another rank removes its own probe


def path_of(out_dir):
    """The path of a checkpoint: of a folder's ckpt.pt, or of a file such as ckpt_best.pt."""
    path = Path(out_dir)
    if path.is_file() or (path.suffix == ".pt" and not path.is_dir()):
        return path
    return path / NAME


def find_sharded(out_dir):
    """The folder of the newest complete sharded checkpoint in out_dir, or None."""
    if Path(out_dir).is_dir():
        for step in reversed(numbered(out_dir, SHARDED)):
            folder = Path(out_dir) / f"{SHARDED}{step}"
            if (folder / "state.json").exists():
                return folder
    return None


def exists(out_dir):
    return path_of(out_dir).exists() or find_sharded(out_dir) is not None


def way_back(out_dir, step):
    """What to do about a run whose numbers are not finite at that step, as the end of a message."""
    if step == 0:
        return "the model is so before its first step: choose --dtype=float32 or another model"
    if exists(out_dir):
        return "lower learning_rate and continue with --init_from=resume"
    return "lower learning_rate and start again"


# -- reading ---------------------------------------------------------------------------------------

def load(out_dir, GPTConfig):
    """The checked state in out_dir, a folder or the path of a file, on the CPU.

    Of a sharded checkpoint it holds the plain values only: load_sharded reads the tensors.
    """
    path = path_of(out_dir)
    sharded = find_sharded(out_dir)
    if sharded:
        path = sharded / "state.json"
        state = read_plain(path)
    elif path.is_file():
        state = read_tensors(path)
    else:
        raise UserError(f"there is no checkpoint {path}: train one with train.py "
                        f"--out_dir={out_dir}, or name another --out_dir")
    return check(state, path, GPTConfig)


def read_tensors(path):
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            # torch compresses nothing, so more than the file's own size is a trap
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("it unpacks to more than its size")
            damaged = archive.testzip()  # torch.load verifies no checksum
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions and the "
                        "disk") from None
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        if out_of_memory(error):
            raise UserError(f"{path} does not fit into memory: use a machine with more") from None
        reason = type(error).__name__
        if type(error) is ValueError:
            reason = one_line(error)
        raise UserError(
            f"{path} is damaged or not a checkpoint ({reason}): restore it from a copy, or train "
            "again with --overwrite=True") from None


def read_plain(path):
    try:
        return schema.read_json(path, dict)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): restore it from a copy, or train "
                        "again with --overwrite=True") from None


def check(state, path, GPTConfig):
    """Validates and returns state, with the defaults of what an older file lacks."""
    try:
        schema.check(state, dict, "its content")
        for key, (kind, default) in KEYS.items():
            if default is not REQUIRED:
                state.setdefault(key, default)
            schema.check(state, {key: kind}, "its content")
        if state["config"].get("vocab_size") is None:
            raise ValueError("its config has no vocab_size")
    except ValueError as error:
        raise UserError(f"{path} is not a checkpoint of this program ({one_line(error)}): name "
                        "another --out_dir") from None
    state["config"] = asdict(build(GPTConfig, typed(GPTConfig, state["config"], path)))
    return state


def typed(cls, values, path):
    """Stored values of settings of cls, checked as if they had been given."""
    for key in values:
        check_key(cls, key, path)
    return {key: convert(cls, key, value, str(path)) for key, value in values.items()}


# -- models and optimizers -------------------------------------------------------------------------

def new_model(GPT, config, seed=1337):
    """GPT(config, seed). Raises UserError if the machine cannot hold it."""
    try:
        if not torch.empty(0).is_meta:
            check_memory({SHAPE: 4 * count_params(GPT, config)})
        return GPT(config, seed)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"a model of this size cannot be created here ({one_line(error, 100)}): "
                        f"lower {SHAPE}") from None


def load_model(GPT, config, state):
    """GPT(config) with the weights of a loaded checkpoint, in float32 on the CPU."""
    weights = dict(state["model"])
    if not weights:
        raise UserError("the checkpoint is sharded over ranks: finish its run with "
                        "--init_from=resume --parallel=fsdp, which writes a ckpt.pt")
    try:
        held = sum(x.numel() for x in weights.values())
        wanted = count_params(GPT, config)
        if wanted > held:  # checked first: config could ask for more than fits into memory
            raise ValueError(f"{held:,} numbers, not {wanted:,}")
        model = new_model(GPT, config)
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the weights in the checkpoint do not fit its config ({one_line(error)}): "
                        "it is damaged, or of another version") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("the weights in the checkpoint are not finite: go back to an older one")
    return model


def freeze(model, pattern):
    """Makes only the parameters trainable whose names match pattern."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"no parameter matches trainable={pattern!r}: look at the names in "
                        "model.py, such as q_proj")


def optimized(model, optimizers):
    """(name, parameter, optimizer) of every optimized parameter, in the order of the groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter, optimizer


def moments(model, optimizers):
    """The state of the optimizers for a checkpoint: moments by the name of their parameter."""
    state = {}
    for name, parameter, optimizer in optimized(model, optimizers):
        if parameter in optimizer.state:
            state[name] = dict(optimizer.state[parameter])
    return {"state": state}


def load_optimizers(config, state, model, optimizers):
    """Fills the optimizers of a resumed run, and a model whose checkpoint is sharded."""
    if state is not None and not state["model"]:
        load_sharded(config.out_dir, model, optimizers, state)
    elif config.init_from == "resume":
        load_moments(model, optimizers, state)


def load_moments(model, optimizers, state):
    """Gives the optimizers the moments in a checkpoint; hyperparameters stay those of the settings.

    Shapes are checked here: a fused kernel would write past the end of a moment that is too small.
    """
    saved = state["optimizer"].get("state")
    wanted = list(optimized(model, optimizers))
    try:
        schema.check(saved, dict, "the state")
        if saved and all(type(key) is int for key in saved):  # older ones number the parameters
            saved = {wanted[key][0]: value for key, value in saved.items()}
        if state["step"] > 0 and saved.keys() != {name for name, _, _ in wanted}:
            raise ValueError("it has moments of other parameters")
        for name, parameter, optimizer in wanted:
            if name in saved:
                kinds = MOMENTS[type(optimizer)]
                schema.check(saved[name], dict.fromkeys(kinds, dense_float_tensor), name)
                check_moments(saved[name], parameter, kinds, state["step"])
    except (ValueError, IndexError) as error:
        raise UserError(
            f"the optimizer's state in the checkpoint does not fit the model ({one_line(error)}): "
            "pass its folder as --init_from, to start from its weights in another --out_dir"
        ) from None
    for name, parameter, optimizer in wanted:
        if name in saved:
            optimizer.state[parameter] = {
                key: placed(x, parameter) if x.dim() else x.to(parameter.device)
                for key, x in saved[name].items()}


def check_moments(saved, parameter, kinds, steps):
    """Raises ValueError unless an optimizer that keeps kinds can have saved these moments of a
    parameter after that many steps, some of which may have been skipped."""
    if saved.keys() != kinds.keys():
        raise ValueError(f"it has the moments {', '.join(map(str, saved))}")
    for name, x in saved.items():
        shape = parameter.shape if kinds[name] else ()
        if tuple(x.shape) != tuple(shape) or x.dtype != torch.float32:
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}")
        if x.isnan().any() or (name == "exp_avg_sq" and (x < 0).any()):
            raise ValueError(f"{name} has values that no step can give")
    if "step" in saved:
        check_count(saved["step"].item(), steps, "it")


def check_count(count, steps, name):
    """Raises ValueError if an optimizer cannot have done count steps in a run that did steps."""
    if not 0 <= count <= steps:
        raise ValueError(f"{name} is at step {count}, the run at {steps}")


def load_sharded(out_dir, model, optimizers, state):
    """Fills model and optimizers, split over any number of ranks, from out_dir's newest sharded
    checkpoint."""
    folder = find_sharded(out_dir)
    steps = state["optimizer"]
    try:
        schema.check(steps, {str: schema.number}, "optimizer")
        for name, count in steps.items():
            check_count(count, state["step"], name)
    except ValueError as error:
        raise UserError(f"{folder / 'state.json'} is damaged ({one_line(error)}): start again with "
                        "--overwrite=True") from None
    wanted = list(optimized(model, optimizers))
    numbered = all(key.isdecimal() for key in steps)  # older checkpoints number the parameters
    if steps and len(steps) != len(wanted):
        raise UserError(f"{folder} holds moments of {len(steps)} parameters, not {len(wanted)}: it "
                        "is damaged")
    parts = {f"model.{name}": x for name, x in model.state_dict().items()}
    try:
        for number, (name, parameter, optimizer) in enumerate(wanted):
            if steps:
                key = str(number) if numbered else name
                first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
                step = torch.tensor(steps[key], device=parameter.device)
                optimizer.state[parameter] = dict(step=step, exp_avg=first, exp_avg_sq=second)
                parts |= {f"exp_avg.{key}": first, f"exp_avg_sq.{key}": second}
        with warnings.catch_warnings(action="ignore"):
            dcp.load(parts, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except (dcp.api.CheckpointException, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} does not fit the model or is damaged ({one_line(error)}): start "
                        "again with --overwrite=True") from None
    if not all(local(x).isfinite().all() for x in parts.values()):
        raise UserError(f"the weights or moments in {folder} are not finite: start again with "
                        "--overwrite=True")


# -- from settings to a run ------------------------------------------------------------------------

def per_call(given, cls):
    """Builds cls from the settings that apply to this call only (PER_CALL)."""
    return build(cls, {key: value for key, value in given.items() if key in PER_CALL})


def start(given, cls, GPTConfig):
    """(settings, state) of a run: state is the checkpoint to start from, or None.

    A resumed run takes unspecified settings from its checkpoint; from another run's weights, only
    the model's. cls extends GPTConfig.
    """
    call = per_call(given, cls)
    out_dir, init_from = call.out_dir, call.init_from
    if out_dir.endswith(".pt") and not (call.eval_only or Path(out_dir).is_dir()):
        raise UserError(f"out_dir={out_dir} is a folder, but .pt ends the name of a checkpoint "
                        "file: choose another --out_dir")
    if init_from == "auto":
        init_from = "resume" if exists(out_dir) else "scratch"
    resume = init_from == "resume"
    if exists(out_dir) and not (resume or call.overwrite or call.eval_only):
        raise UserError(f"{out_dir} holds a checkpoint: continue it with --init_from=resume, "
                        "replace it with --overwrite=True, or choose another --out_dir")
    if call.eval_only and init_from == "scratch":
        raise UserError("eval_only needs weights: add --init_from=resume, or --init_from=FOLDER "
                        "with another run's checkpoint")
    given = given | {"init_from": init_from}
    if init_from == "scratch":
        return build(cls, given), None
    source = out_dir if resume else init_from
    if not Path(source).exists():
        raise UserError(f"{source} is not a folder: init_from takes scratch, resume, auto, a "
                        "folder that holds a checkpoint, or the path of a ckpt_STEP.pt")
    state = load(source, GPTConfig)
    if resume and not state["settings"]:
        raise UserError(f"{source} holds converted weights and no run to resume: pass it as "
                        f"--init_from={source}, with another --out_dir")
    # check given settings first, so that the error names the cause and not what follows from it
    check_model({k: v for k, v in given.items() if v is not None}, state, source, resume)
    base = state["config"]
    if resume:
        base = base | typed(cls, state["settings"], source)
    config = build(cls, base | given)
    config.vocab_size = config.vocab_size or state["config"]["vocab_size"]
    check_model(asdict(config), state, source, resume)
    if resume:
        check_resume(config, state)
    return config, state


def check_model(values, state, source, resume):
    """Raises UserError if a model setting in values differs from the checkpoint in source."""
    for name, before in state["config"].items():
        may_change = not resume and name in ("block_size", "dropout")
        if values.get(name, before) != before and not may_change:
            raise UserError(
                f"{name}={values[name]}, but the model in {source} has {before}: leave {name} out, "
                "or start from scratch in another --out_dir")


def check_resume(config, state):
    """Raises UserError if a setting differs that a run must keep to its end."""
    for name in ("seed", "tokens_per_step"):
        value, before = getattr(config, name), state["settings"].get(name)
        if value != before:
            raise UserError(
                f"{name}={value}, but the run in {config.out_dir} has {before}: leave {name} out, "
                "or start another run with another --out_dir")
    if state["step"] > config.max_steps:
        raise UserError(f"the run in {config.out_dir} is at step {state['step']}, beyond "
                        f"max_steps={config.max_steps}: raise it")


def check_data(config, state, meta):
    """Raises UserError if the data set's meta does not fit the state that a run starts from."""
    if state is None:
        return
    source = config.out_dir if config.init_from == "resume" else config.init_from
    tokenizer = state["tokenizer"]
    if tokenizer != meta["tokenizer"]:
        tokenizer = present_name(tokenizer, path_of(source).parent)
    if tokenizer not in (meta["tokenizer"], "none"):
        same = source if tokenizer.startswith("tokenizer.json") else tokenizer
        raise UserError(
            f"data set {config.dataset!r} has tokenizer {meta['tokenizer']!r}, the model in "
            f"{source} has {tokenizer!r}: prepare the data with --tokenizer={same}")
    if config.init_from == "resume" and meta["sha256"] != state["dataset_sha256"]:
        raise UserError(
            f"data set {config.dataset!r} is not the one that the run in {source} was trained on "
            "(another sha256): prepare that one again, or start another run with another --out_dir")


def verify_data(config, dataset):
    """Verifies the data of a resumed run: one rank of each machine does, the others wait."""
    if config.init_from == "resume":
        if world()[2] == 0:
            dataset.verify()
        barrier()


def check_run(GPT, GPTConfig, config, dataset, ranks, step=0):
    """Raises UserError if a run of config on that many ranks, from that step on, cannot work.

    train.py calls it before it writes anything, compare.py before the first of its runs.
    """
    check_parallel(config, ranks)
    dataset.check(config)
    batch_size = batch_shape(config, ranks)[0]
    check_training(GPT, config, batch_size, ranks, step)
    if config.trainable:
        with torch.device("meta"):
            freeze(GPT(subset(GPTConfig, config)), config.trainable)


def run_settings(config, GPTConfig):
    """The settings that a resumed run takes from its checkpoint, beside those of its model."""
    left_out = PER_CALL | {field.name for field in fields(GPTConfig)}
    return {key: value for key, value in asdict(config).items() if key not in left_out}

