"""The folder of a run: names of its files, its lock, and what an earlier run has left in it."""
import contextlib
import re
import shutil
from pathlib import Path

from nanogqa.configurator import UserError
from nanogqa.distributed import barrier, first_rank, sum_over_ranks
from nanogqa.files import check_writable, created, lock

NEWEST = "ckpt.pt"  # the newest checkpoint
BEST = "ckpt_best.pt"  # the one with the lowest validation loss
SHARDED = "sharded_"  # sharded_STEP is a folder of safetensors, whose state.json is written last
# what a killed run may leave
LEFT = re.compile(r"(ckpt(_best|_\d+)?\.pt|metrics\.jsonl|trace\.json|wandb\.json|"
                  r"tokenizer(_config)?\.json)\.part|\.probe\d+")


def numbered(out_dir, before, after=""):
    """The numbers N, in order, for which out_dir holds a file or folder BEFORE + N + AFTER.

    Other names, such as ckpt_007.pt or sharded_backup, are not of a run.
    """
    name = re.compile(re.escape(before) + r"(0|[1-9]\d{0,17})" + re.escape(after))
    found = []
    for path in Path(out_dir).iterdir():
        match = name.fullmatch(path.name)
        if match:
            found.append(int(match[1]))
    return sorted(found)


def lock_folder(out_dir, stack):
    """Locks out_dir until stack closes: rank 0 does, the others wait for it."""
    if first_rank():
        stack.enter_context(lock(out_dir, f"another run writes to {out_dir}: wait until it has "
                                          "ended, or choose another --out_dir"))
    barrier()


def lock_existing(call, stack):
    """Locks the out_dir of call, the settings of resume.call_settings, as lock_folder does, if rank
    0 finds it. Returns whether it is locked. An evaluation writes nothing, and locks nothing."""
    found = first_rank() and Path(call.out_dir).is_dir()
    if call.eval_only or not sum_over_ranks(float(found)):  # all ranks act as rank 0 does
        return False
    lock_folder(call.out_dir, stack)
    return True


def open_folder(out_dir, locked, stack):
    """Creates the folder of a run and locks it, unless it is locked already."""
    if first_rank():
        stack.enter_context(created(out_dir))
    if not locked:
        lock_folder(out_dir, stack)
        if exists(out_dir):  # there was no folder when this run looked for a checkpoint
            raise UserError(f"another run has written to {out_dir} meanwhile: continue that one "
                            "with --init_from=resume, or choose another --out_dir")
    if first_rank():
        remove_left(out_dir)
    check_writable(out_dir)


def remove_left(out_dir):
    """Removes what killed runs have left. The folder is locked."""
    if (Path(out_dir) / f"{NEWEST}.part").exists() and not exists(out_dir):
        (Path(out_dir) / BEST).unlink(missing_ok=True)  # of a first save: see check_free
    for path in Path(out_dir).iterdir():
        if LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)  # another rank removes its own probe


def path_of(out_dir):
    """The path of a checkpoint: of a folder's ckpt.pt, or of a file such as ckpt_best.pt."""
    path = Path(out_dir)
    if path.is_file() or (path.suffix == ".pt" and not path.is_dir()):
        return path
    return path / NEWEST


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


def check_free(out_dir):
    """Raises UserError if a new run would replace checkpoints in out_dir."""
    if exists(out_dir):
        raise UserError(f"{out_dir} holds a checkpoint: continue it with --init_from=resume, "
                        "replace it with --overwrite=True, or choose another --out_dir")
    # a run that was killed at its first checkpoint may have named it ckpt_best.pt alone
    killed = (Path(out_dir) / f"{NEWEST}.part").exists()
    if (Path(out_dir) / BEST).exists() and not killed:
        raise UserError(f"{out_dir} holds {BEST}, but no {NEWEST}: copy it to {NEWEST} to "
                        "continue, replace it with --overwrite=True, or choose another --out_dir")


def way_back(out_dir, step):
    """What to do about a run whose numbers are not finite at that step, as the end of a message."""
    if step == 0:
        return "training has not begun yet, so choose --dtype=float32 or another model"
    if exists(out_dir):
        return "lower learning_rate and continue with --init_from=resume"
    return "lower learning_rate and start again"


def clear_sharded(out_dir, rank, keep=None):
    """Removes the sharded checkpoints in out_dir, except the folder keep."""
    if rank == 0:
        for step in numbered(out_dir, SHARDED):
            folder = Path(out_dir) / f"{SHARDED}{step}"
            if folder != keep:
                with contextlib.suppress(OSError):  # first: without it the folder is incomplete
                    (folder / "state.json").unlink()
                shutil.rmtree(folder, ignore_errors=True)
