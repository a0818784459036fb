"""Checkpoints: one file of tensors and plain values, written whole or not at all, read without running code."""
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch

from configurator import UserError, build, check_key, convert
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
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # the bytes before the name: a crash leaves the old checkpoint or the new one
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(out_dir):
    """The state that save wrote, on the CPU."""
    path = Path(out_dir) / NAME
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train one with train.py --out_dir={out_dir}, or name another --out_dir")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): mend its permissions or the disk") from None
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}): restore it from a copy, or "
                        "train again with --overwrite=True") from None
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


def build_model(state, settings=None):
    """The GPT of a loaded checkpoint, in float32 on the CPU; settings change what its weights leave open (dropout, ...)."""
    model = new_model(model_config(settings) if settings else GPTConfig(**state["config"]))
    try:
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the weights in the checkpoint do not fit its config ({' '.join(str(error).split())[:200]}): it is "
                        "damaged, or of another version") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("the weights in the checkpoint are not finite: go back to an older one")
    return model


def new_model(config, seed=1337):
    """GPT(config, seed), with a UserError where the machine cannot hold it."""
    try:
        return GPT(config, seed)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"a model of this size cannot be made here ({' '.join(str(error).split())[:100]}): lower n_layer, "
                        "n_embd, n_ff or vocab_size") from None


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
    optimizer.load_state_dict(dict(state=saved, param_groups=groups))


def model_config(settings):
    """The GPTConfig that a program's settings contain."""
    return GPTConfig(**{f.name: getattr(settings, f.name) for f in fields(GPTConfig)})
