"""Checkpoints: one file of tensors and plain values, written whole or not at all, read without running code."""
import os
from dataclasses import fields
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, GPTConfig

NAME = "ckpt.pt"
# what a checkpoint holds
KEYS = {"model": dict,        # the model's state dict, with the names of model.py
        "config": dict,       # of GPTConfig
        "optimizer": dict,    # the optimizer's state dict
        "settings": dict,     # of train.py beside the model's, as asked for: "auto" stays "auto"
        "runtime": dict,      # what they came to: device, dtype, compile, ranks
        "step": int,          # optimizer steps done
        "val_loss": (float, type(None)),  # nats per token, if this step was evaluated
        "tokenizer": str,     # a name for dataloader.get_tokenizer
        "dataset_sha256": str}


def save(out_dir, state):
    """Writes state, a dict of KEYS, as out_dir's checkpoint. OSError leaves the previous one as it was."""
    path, part = Path(out_dir) / NAME, Path(out_dir) / f"{NAME}.part"
    with open(part, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())  # the bytes before the name: a crash leaves the old checkpoint or the new one
    os.replace(part, path)


def load(out_dir):
    """The state that save wrote, on the CPU."""
    path = Path(out_dir) / NAME
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train one with train.py --out_dir={out_dir}, or name another --out_dir")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}): restore it from a copy, or "
                        "train again with --overwrite=True") from None
    wrong = [key for key, kind in KEYS.items() if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of this program (no {', '.join(wrong)}): name another --out_dir")
    return state


def build_model(state, settings=None):
    """The GPT of a loaded checkpoint, in float32 on the CPU; settings change what its weights leave open (dropout, ...)."""
    try:
        model = GPT(model_config(settings) if settings else GPTConfig(**state["config"]))
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).replace("\n", " ")[:200]
        raise UserError(f"the weights in the checkpoint do not fit its config ({reason}): it is damaged, or of another "
                        "version") from None
    return model


def load_optimizer(optimizer, state):
    """Gives optimizer the state that the checkpoint holds for it."""
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's optimizer does not fit this one ({error}): pass its folder as --init_from, to "
                        "start from its weights in another --out_dir") from None


def model_config(settings):
    """The GPTConfig that a program's settings contain."""
    return GPTConfig(**{f.name: getattr(settings, f.name) for f in fields(GPTConfig)})
