"""Writes checkpoints: whole files by a thread of rank 0, or a part by each rank."""
import contextlib
import errno
import math
import os
import shutil
import threading
import warnings
from pathlib import Path

import torch

from nanogqa.configurator import UserError, one_line
from nanogqa.distributed import cause, sum_over_ranks, whole
from nanogqa.files import replacing, sync, write_json
from nanogqa.folder import BEST, NEWEST, SHARDED, clear_sharded, find_sharded, numbered
from nanogqa.terminal import warn
from nanogqa.tokenizer import copy_tokenizer


def save(out_dir, state, also=()):
    """Writes state, a dict of checkpoint.KEYS, to out_dir, and under the names in also.

    After an OSError, ckpt.pt is the previous one.
    """
    out_dir = Path(out_dir)
    parts = {}
    try:
        with replacing(out_dir / NEWEST, "wb") as file:
            torch.save(state, file)
            sync(file)  # the links share its content, so that must be on the disk before they are
            for name in also:
                parts[name] = link(file.name, out_dir / f"{name}.part")
            for name, part in parts.items():
                os.replace(part, out_dir / name)
    except RuntimeError as error:  # torch's own error where the disk is full
        raise OSError(0, one_line(error, 100)) from None
    finally:
        for name in also:
            (out_dir / f"{name}.part").unlink(missing_ok=True)


def link(source, path):
    """Gives the file source a second name, path, which it returns."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, path)
        with open(path, "rb") as file:
            sync(file)
    return path


class Saver:
    """Writes checkpoints in a thread, so that training does not wait for the disk.

    ckpt.pt is the newest, ckpt_best.pt that of the lowest validation loss among those written,
    ckpt_STEP.pt are the last keep ones. A failed write prints a warning; .failed holds it until one
    succeeds. A resumed run with another eval_tokens forgets the lowest loss: see take_over.
    """

    def __init__(self, config, kept=(), best=None, rank=0):
        self.out_dir = Path(config.out_dir)
        self.keep = config.keep_checkpoints
        self.resumed = config.init_from == "resume"
        self.rank = rank
        self.kept = list(kept)  # steps of the ckpt_STEP.pt that this run has written
        self.best = best  # lowest validation loss of its checkpoints
        self.thread = None
        self.failed = None

    def save(self, state, last=False):
        """Waits for the previous write, copies state to host memory and starts a write by rank 0.
        All ranks may call it, and must if the weights are split over them. last: the run ends with
        this checkpoint (see ShardedSaver)."""
        self.wait()
        state = self.with_best(host_copy(state, self.rank == 0))
        if self.rank == 0:
            self.thread = threading.Thread(target=self.write, args=[state])
            self.thread.start()

    def with_best(self, state):
        """state with best_val_loss, the lowest of the checkpoints so far."""
        losses = [loss for loss in (state["val_loss"], self.best) if loss is not None]
        return state | {"best_val_loss": min(losses, default=None)}

    def write(self, state):
        also = []
        if state["val_loss"] is not None and state["val_loss"] == state["best_val_loss"]:
            also.append(BEST)
        kept = self.kept
        if self.keep:
            also.append(f"ckpt_{state['step']}.pt")
            kept = sorted({state["step"], *self.kept})
        try:
            save(self.out_dir, state | {"kept": kept}, also)
            self.failed = None
            self.kept = kept
            self.best = state["best_val_loss"]
            self.remove_old()
        except OSError as error:
            remedy = "check its disk and permissions"
            if error.errno in (0, errno.ENOSPC, errno.EDQUOT):  # 0: torch's own error, see save
                size = math.ceil(sum(x.nbytes for x in tensors(state)) / 2**20)
                remedy = f"free {size:,} MiB"
            self.fail(f"cannot save step {state['step']} to {self.out_dir} ({error.strerror}): "
                      f"{remedy}; {self.previous()}")
        except Exception as error:  # the thread would end unnoticed, and the run as if it had saved
            self.fail(f"cannot save step {state['step']} to {self.out_dir} ({one_line(error)}): "
                      f"{self.previous()}")

    def previous(self):
        """What is left after a failed write, as text."""
        if (self.out_dir / NEWEST).exists():
            return "the previous checkpoint is whole"
        return "nothing is saved yet"

    def remove_old(self):
        """Deletes all ckpt_STEP.pt files that this run has written, except the last keep ones."""
        if self.keep:
            for old in self.kept[:-self.keep]:
                with contextlib.suppress(OSError):  # the checkpoint is saved all the same
                    (self.out_dir / f"ckpt_{old}.pt").unlink()
            self.kept = self.kept[-self.keep:]

    def fail(self, message):
        self.failed = message
        warn(f"{message}; while the run goes on, each log line tries again")

    def wait(self):
        """Returns once nothing is being written."""
        if self.thread is not None:
            self.thread.join()

    def check_written(self):
        """Waits for the last write, and raises UserError if it failed."""
        self.wait()
        if self.failed:
            raise UserError(f"{self.failed}: continue with --init_from=auto")


def host_copy(value, wanted=True):
    """A copy of nested dicts with every tensor whole and in host memory.

    All ranks call it, as each holds a part of a split tensor. Where wanted is False, tensors
    become None.
    """
    if isinstance(value, torch.Tensor):
        value = whole(value)
        return value.detach().to("cpu", copy=True) if wanted else None
    if isinstance(value, dict):
        return {key: host_copy(x, wanted) for key, x in value.items()}
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
            if self.rank > 0:
                self.failed = None  # rank 0 alone writes now, and says if it fails
            if not self.failed:
                clear_sharded(self.out_dir, self.rank)
            return
        import torch.distributed.checkpoint as dcp  # see shard in nanogqa/distributed.py

        folder = self.out_dir / f"{SHARDED}{state['step']}"
        parts, plain = split(self.with_best(state))
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch may still change this interface
                dcp.save(parts, storage_writer=writer)
            if self.rank == 0:
                plain["kept"] = self.kept
                write_json(folder / "state.json", plain)  # last: it marks the folder as complete
            failed = None
        except (dcp.api.CheckpointException, OSError) as error:
            failed = (f"cannot save step {state['step']} to {folder} ({one_line(cause(error))}): "
                      "free some space, and check the disk")
        # a rank may fail alone, but the next attempt is one of all ranks
        if sum_over_ranks(float(failed is not None)):
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)  # the next attempt needs its room
            self.fail(failed or "another rank cannot save its part")
        else:
            self.failed = None
            if self.rank == 0 and self.best is None and not self.resumed:
                with contextlib.suppress(OSError):
                    (self.out_dir / BEST).unlink()  # of a run that this one replaces
            self.best = plain["best_val_loss"]
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


def same_windows(config, state):
    """Whether config evaluates the windows of the checkpoint state: others give another loss."""
    return state["settings"].get("eval_tokens", config.eval_tokens) == config.eval_tokens


def take_over(config, state, dataset, rank):
    """Makes out_dir this run's own, and returns its Saver; state is the checkpoint that the run
    starts from, or None.

    Copies the data set's tokenizer to out_dir, over an existing one unless the run is resumed.
    Removes sharded checkpoints: a resumed run keeps the newest complete one, any other keeps none.
    """
    kept, best, sharded = [], None, None
    resumed = config.init_from == "resume"
    if resumed:
        kept, best = state["kept"], state["best_val_loss"]
        if not same_windows(config, state):
            best = None  # the losses cannot be compared
        sharded = find_sharded(config.out_dir)
    if kept is None:  # an older checkpoint does not say
        kept = [n for n in numbered(config.out_dir, "ckpt_", ".pt") if n <= state["step"]]
    clear_sharded(config.out_dir, rank, keep=sharded)
    if rank == 0:
        copy_tokenizer(dataset.meta["tokenizer"], dataset.folder, config.out_dir, not resumed)
    kind = ShardedSaver if config.parallel == "fsdp" else Saver
    return kind(config, kept, best, rank)
