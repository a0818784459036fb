"""Checkpoints: one file of tensors and plain values, written whole or not at all, read without running code."""
import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from nanogqa.configurator import UserError, build, check_key, convert
from nanogqa.files import write_json

NAME = "ckpt.pt"
# what a checkpoint holds
KEYS = {"model": dict,        # the model's state dict, with the names of model.py
        "config": dict,       # of GPTConfig
        "optimizer": dict,    # the optimizer's state dict
        "settings": dict,     # of train.py beside the model's, as asked for: "auto" stays "auto"
        "runtime": dict,      # what they came to: device, dtype, compile, ranks
        "step": int,          # optimizer steps done
        "val_loss": (float, type(None)),  # nats per token, if this step was evaluated
        "best_val_loss": (float, type(None)),  # the least of the run so far
        "tokenizer": str,     # a name for dataloader.get_tokenizer
        "dataset_sha256": str}


BEST = "ckpt_best.pt"


def save(out_dir, state, also=()):
    """Writes state, a dict of KEYS, as out_dir's checkpoint, and under the names in also. OSError leaves the previous ones."""
    path, part = Path(out_dir) / NAME, Path(out_dir) / f"{NAME}.part"
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # the bytes before the name: a crash leaves the old checkpoint or the new one
        for name in also:
            link = Path(out_dir) / f"{name}.part"
            link.unlink(missing_ok=True)
            try:
                os.link(part, link)  # the same bytes once more: the next ckpt.pt is another file
            except OSError:          # not every file system can
                shutil.copyfile(part, link)
            os.replace(link, Path(out_dir) / name)
        os.replace(part, path)
    except RuntimeError as error:    # torch's own words for a disk that is full
        raise OSError(0, " ".join(str(error).split())[:100]) from None
    finally:
        part.unlink(missing_ok=True)


class Saver:
    """Writes checkpoints in a thread, so that training waits for no disk: ckpt.pt, the newest; ckpt_best.pt, of the least
    validation loss; and ckpt_STEP.pt, the last keep of them. A write that fails is said, and .failed until one succeeds."""

    def __init__(self, out_dir, keep, rank=0):
        self.out_dir, self.keep, self.rank, self.thread, self.failed = Path(out_dir), keep, rank, None, None

    def save(self, state, last=False):
        """Returns when state is copied to host memory (and the write before is done). All ranks call it, rank 0 writes."""
        self.wait()
        state = host_copy(state, self.rank == 0)
        if self.rank == 0:
            self.thread = threading.Thread(target=self.write, args=[state])
            self.thread.start()

    def write(self, state):
        best = state["val_loss"] is not None and state["val_loss"] == state["best_val_loss"]
        try:
            save(self.out_dir, state, [BEST] * best + [f"ckpt_{state['step']}.pt"] * (self.keep > 0))
            self.failed = None
            steps = sorted(int(path.stem[5:]) for path in self.out_dir.glob("ckpt_*.pt") if path.stem[5:].isdecimal())
            for step in steps[:-self.keep] if self.keep else ():
                (self.out_dir / f"ckpt_{step}.pt").unlink()
        except OSError as error:
            size = sum(x.nbytes for x in tensors(state))
            self.failed = (f"cannot save step {state['step']} to {self.out_dir} ({error.strerror}): make {size / 2**20:,.0f} MiB of "
                           "room; the previous checkpoint is whole")
            print(f"warning: {self.failed}, and the next log line tries again", file=sys.stderr, flush=True)

    def wait(self):
        """Returns when nothing is being written."""
        if self.thread is not None:
            self.thread.join()


def host_copy(value, wanted=True):
    """value, of dicts and lists, with every tensor whole in host memory; None for tensors where wanted is False."""
    if isinstance(value, torch.Tensor):
        value = value.full_tensor() if isinstance(value, DTensor) else value  # all ranks give their part
        return value.detach().to("cpu", copy=True) if wanted else None
    if isinstance(value, dict):
        return {key: host_copy(x, wanted) for key, x in value.items()}
    return [host_copy(x, wanted) for x in value] if isinstance(value, list) else value


def tensors(value):
    """The tensors in value, of dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from tensors(x)


# -- checkpoints of sharded models -------------------------------------------------------------------------------------------

SHARDED = "sharded_"  # and the step: a folder of safetensors and, written last, state.json


class ShardedSaver(Saver):
    """Each rank writes its own part, as safetensors; ckpt.pt, which any program reads, is written at the end of the run."""

    def save(self, state, last=False):
        if last:
            super().save(state)
            self.wait()
            return None if self.failed else clear_sharded(self.out_dir, self.rank)
        folder, (tensors, plain) = self.out_dir / f"{SHARDED}{state['step']}", split(state)
        try:
            with warnings.catch_warnings(action="ignore"):  # of an interface that torch may still change
                dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
            if self.rank == 0:
                write_json(folder / "state.json", plain)  # last: it says that the rest is whole
            self.failed = None
            clear_sharded(self.out_dir, self.rank, but=folder)
        except (dcp.api.CheckpointException, OSError) as error:
            self.failed = f"cannot save step {state['step']} to {folder} ({' '.join(str(error).split())[-200:]}): make room"
            if self.rank == 0:
                print(f"warning: {self.failed}, and the next log line tries again", file=sys.stderr, flush=True)


def split(state):
    """(tensors by flat names, the rest with the optimizer's step counts) of a state."""
    moments = state["optimizer"]["state"]
    tensors = {f"model.{name}": x for name, x in state["model"].items()}
    tensors |= {f"{name}.{i}": moments[i][name] for i in moments for name in ("exp_avg", "exp_avg_sq")}
    plain = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
    return tensors, plain | dict(optimizer={str(i): float(moments[i]["step"]) for i in moments}, model={})


def clear_sharded(out_dir, rank, but=None):
    for folder in Path(out_dir).glob(f"{SHARDED}*") if rank == 0 else ():
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)


def find_sharded(out_dir):
    """The folder of the newest whole sharded checkpoint in out_dir, or None."""
    whole = [path.parent for path in Path(out_dir).glob(f"{SHARDED}*/state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix(SHARDED)), default=None)


def load_sharded(out_dir, model, optimizer, state):
    """Fills model and optimizer, split over any number of ranks, from the newest sharded checkpoint in out_dir."""
    steps, saved = state["optimizer"], optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if steps and len(steps) != len(parameters):
        raise UserError(f"{find_sharded(out_dir)} holds moments of {len(steps)} parameters, not {len(parameters)}: it is damaged")
    saved["state"] = {i: dict(step=torch.tensor(steps[str(i)]), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                      for i, p in enumerate(parameters)} if steps else {}
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(split(dict(model=model.state_dict(), optimizer=saved))[0],
                     storage_reader=dcp.HuggingFaceStorageReader(str(find_sharded(out_dir))))
    except (dcp.api.CheckpointException, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{find_sharded(out_dir)} does not fit the model or is damaged ({' '.join(str(error).split())[-200:]}): "
                        "start again with --overwrite=True") from None
    optimizer.load_state_dict(saved)


def placed(x, parameter):
    """The whole tensor x as parameter is: on its device, and split over the ranks where it is."""
    if not isinstance(parameter, DTensor):
        return x.to(parameter.device)
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


# -- reading -----------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def lock(out_dir, patience=60):
    """While it is open, no other process passes lock(out_dir). UserError after patience seconds of waiting for one."""
    with open(Path(out_dir) / ".lock", "a") as f:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another run writes to {out_dir}: wait until it has ended, or choose another "
                                    "--out_dir") from None
                time.sleep(0.2)
        yield


def find(out_dir):
    """The path of the checkpoint that out_dir names: a folder, or a file like ckpt_best.pt."""
    return Path(out_dir) if str(out_dir).endswith(".pt") else Path(out_dir) / NAME


def load(out_dir, GPTConfig):
    """The state that save wrote, on the CPU; out_dir may be the path of a ckpt_best.pt or ckpt_STEP.pt."""
    path = find(out_dir)
    if sharded := find_sharded(out_dir):
        return load_plain(sharded, GPTConfig)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train one with train.py --out_dir={out_dir}, or name another --out_dir")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum: a flipped bit would be another weight
            if damaged := archive.testzip():
                raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): mend its permissions or the disk") from None
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}): restore it from a copy, or "
                        "train again with --overwrite=True") from None
    return check(state, path, GPTConfig)


def load_plain(sharded, GPTConfig):
    """The state of a sharded checkpoint without its tensors, which load_sharded reads."""
    try:
        state = json.loads((sharded / "state.json").read_text())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{sharded}/state.json is damaged: restore it from a copy, or train again with --overwrite=True") from None
    return check(state, sharded, GPTConfig)


def check(state, path, GPTConfig):
    """state, if it is one."""
    wrong = [key for key, kind in KEYS.items() if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of this program (no {', '.join(wrong)}): name another --out_dir")
    state["config"] = asdict(build(GPTConfig, typed(GPTConfig, state["config"], path)))
    if state["config"]["vocab_size"] is None or state["step"] < 0:
        raise UserError(f"{path} has no vocab_size, or a negative step: name another --out_dir")
    return state


def typed(cls, values, path):
    """The stored values of settings of cls, checked as if they had been given."""
    for key in values:
        check_key(cls, key, path)
    return {key: convert(cls, key, value, str(path)) for key, value in values.items()}


def load_model(GPT, config, state):
    """GPT(config) with the weights of a loaded checkpoint, in float32 on the CPU."""
    if not state["model"]:
        raise UserError("the checkpoint is sharded over ranks: end its run with --init_from=resume --parallel=fsdp, which writes "
                        "a ckpt.pt")
    model = new_model(GPT, config)
    try:
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the weights in the checkpoint do not fit its config ({' '.join(str(error).split())[:200]}): it is "
                        "damaged, or of another version") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("the weights in the checkpoint are not finite: go back to an older one")
    return model


def new_model(GPT, config, seed=1337):
    """GPT(config, seed), with a UserError where the machine cannot hold it."""
    try:
        return GPT(config, seed)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"a model of this size cannot be made here ({' '.join(str(error).split())[:100]}): lower n_layer, "
                        "n_embd, n_ff, vocab_size or the widths of heads and latents") from None


def load_optimizer(optimizer, state):
    """Gives optimizer the moments that the checkpoint holds; its hyperparameters stay those of the settings.

    Shapes are checked here, since a fused kernel would write beyond a moment that is too small.
    """
    groups, saved = optimizer.state_dict()["param_groups"], state["optimizer"].get("state")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_muon = ["momentum" in group for group in optimizer.param_groups for _ in group["params"]]
    try:
        fits = state["step"] == 0 or sorted(saved) == list(range(len(parameters)))
        for i, moments in saved.items():
            shape = tuple(parameters[i].shape)
            wanted = dict(momentum_buffer=shape) if is_muon[i] else dict(step=(), exp_avg=shape, exp_avg_sq=shape)
            fits &= {name: tuple(x.shape) for name, x in moments.items()} == wanted
            fits &= all(x.dtype == torch.float32 for x in moments.values())
    except (AttributeError, TypeError, IndexError):
        fits = False
    if not fits:
        raise UserError("the optimizer's state in the checkpoint does not fit the model: pass its folder as --init_from, to "
                        "start from its weights in another --out_dir")
    saved = {i: {name: placed(x, parameters[i]) if x.dim() else x for name, x in moments.items()} for i, moments in saved.items()}
    optimizer.load_state_dict(dict(state=saved, param_groups=groups))
