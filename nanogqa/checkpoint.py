"""Checkpoints: a file of tensors and plain values, replaced as a whole, read without running code.

The classes GPT and GPTConfig, which this package does not import, are passed in.
"""
import errno
import re
import warnings
import zipfile
from dataclasses import asdict, fields

import torch

from nanogqa import schema
from nanogqa.configurator import UserError, build, convert, one_line, out_of_memory
from nanogqa.costs import SIZE_SETTINGS, NoInit, count_params, meta_model, num_params
from nanogqa.distributed import cause, local, lost, placed
from nanogqa.folder import find_sharded, path_of
from nanogqa.runtime import check_memory

REQUIRED = object()


class Damaged(UserError):
    """The content of a checkpoint is not what this program writes."""


# steps in a row without a finite gradient at which train.py stops; up to there, a checkpoint may
# have no moments yet
MAX_SKIPS = 10


def plain_value(value):
    """Text, a number that fits into 64 bits, True, False or None."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, (str, float))


def dense_float_tensor(value):
    """A dense float tensor on the CPU whose elements do not overlap in memory."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_nested:
        return False
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    reach = 1  # numbers in memory from the first to the last element of the dimensions so far
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * (size - 1) + 1)
    return value.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def list_of_steps(value):
    """A list of steps, or None."""
    return value is None or (isinstance(value, list) and all(map(schema.count, value)))


# what a checkpoint holds: the schema of each entry, and its value where an older file lacks it
KEYS = {
    "model": ({str: dense_float_tensor}, REQUIRED),  # the model's state dict
    "config": ({str: plain_value}, REQUIRED),        # of GPTConfig
    "optimizer": (dict, REQUIRED),                   # "state": moments by the parameter's name
    "settings": ({str: plain_value}, REQUIRED),      # of train.py except the model's; not resolved
    "runtime": ({str: plain_value}, REQUIRED),       # the resolved device, dtype, compile, ranks
    "step": (schema.count, REQUIRED),                # optimizer steps done
    "val_loss": (schema.number_or_none, None),       # nats per target, if this step was evaluated
    "best_val_loss": (schema.number_or_none, None),  # the lowest of the run so far
    "kept": (list_of_steps, None),                   # steps whose ckpt_STEP.pt the run has written
    "tokenizer": (schema.short_text, REQUIRED),      # a name for tokenizer.get_tokenizer
    "dataset_sha256": (schema.short_text, REQUIRED),  # of meta.json; empty: not trained here
}

# the moments that an optimizer keeps of a parameter: True where they have its shape
MOMENTS = {
    torch.optim.AdamW: {"step": False, "exp_avg": True, "exp_avg_sq": True},
    torch.optim.Muon: {"momentum_buffer": True},
}


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
                        f"--out_dir={path.parent}, or name another folder")
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
        return plain_dicts(torch.load(path, map_location="cpu", weights_only=True), {})
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        # EINVAL is no fault of the disk: in a damaged archive, zipfile may seek to before its start
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"cannot read {path} ({error.strerror}): check its permissions and the "
                            "disk") from None
        if out_of_memory(error):
            raise UserError(f"{path} does not fit into memory: use a machine with more") from None
        reason = type(error).__name__
        if type(error) is ValueError:
            reason = one_line(error)
        raise Damaged(
            f"{path} is damaged or not a checkpoint ({reason}): restore it from a copy, or train "
            "again with --overwrite=True") from None


def plain_dicts(value, copies):
    """value with a new dict for each dict in it, and a new tensor for each tensor: attributes of an
    OrderedDict and of a tensor come from the file and may hide methods. copies are the dicts made
    so far, by id."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor.detach(value)
    if not isinstance(value, dict):
        return value
    if id(value) not in copies:
        copies[id(value)] = {}
        for key, inner in dict.items(value):
            copies[id(value)][key] = plain_dicts(inner, copies)
    return copies[id(value)]


def read_plain(path):
    try:
        return schema.read_json(path, dict)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions and the "
                        "disk") from None
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({one_line(error)}): restore it from a copy, or train "
                      "again with --overwrite=True") from None


def check(state, path, GPTConfig):
    """Validates and returns state, with the defaults of what an older file lacks."""
    try:
        schema.check(state, dict, "its content")
        for key, (kind, default) in KEYS.items():
            if default is not REQUIRED:
                state.setdefault(key, default)
            schema.check(state, {key: kind}, "its content")
        if not state["model"] and path.name != "state.json":
            raise ValueError("its model is empty")
        if state["config"].get("vocab_size") is None:
            raise ValueError("its config has no vocab_size")
    except ValueError as error:
        raise Damaged(f"{path} is not a checkpoint of this program ({one_line(error)}): name "
                      "another checkpoint") from None
    values = typed(GPTConfig, state["config"], path)
    try:
        state["config"] = asdict(build(GPTConfig, values))
    except UserError as error:
        raise UserError(f"{path} has settings that no model can have ({one_line(error)}): use the "
                        "version that wrote it, or restore it from a copy") from None
    return state


def typed(cls, values, path):
    """Stored values of settings of cls, checked as if they had been given."""
    checked = {}
    known = {field.name for field in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path} has the setting {key!s:.60}, which this version does not "
                            "know: use the version that wrote it")
        checked[key] = convert(cls, key, value, str(path))
    return checked


# -- models and optimizers -------------------------------------------------------------------------

def new_model(GPT, config, seed=1337):
    """GPT(config, seed). Raises UserError if the machine cannot hold it."""
    try:
        size = torch.get_default_dtype().itemsize  # bench.py creates models in bfloat16 too
        check_memory({SIZE_SETTINGS: size * count_params(GPT, config)})
        with NoInit():
            return GPT(config, seed)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"a model of this size cannot be created here ({one_line(error, 100)}): "
                        f"lower {SIZE_SETTINGS}") from None


def is_sharded(state):
    """Whether a loaded checkpoint has its weights in other files: see load_sharded."""
    return not state["model"]


def check_whole(state):
    """Raises UserError if the weights of a loaded checkpoint are split over ranks."""
    if is_sharded(state):
        raise UserError("the checkpoint is sharded over ranks: finish its run with "
                        "--init_from=resume --parallel=fsdp, which writes a ckpt.pt")


def load_model(GPT, config, state):
    """GPT(config) with the weights of a loaded checkpoint, in float32 on the CPU."""
    check_whole(state)
    model = meta_model(GPT, config)  # config may ask for more than fits into memory
    check_weights(model, state["model"])
    check_memory({SIZE_SETTINGS: 4 * num_params(model)})
    model = model.to_empty(device="cpu")
    model.load_state_dict(state["model"])
    return model


def check_weights(model, weights):
    """Raises UserError unless the weights of a loaded checkpoint have the names and shapes of the
    model's, which may be a meta model, and are finite in float32."""
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if found.get(name) != shapes.get(name):
            difference = f"{name:.100} has the shape {found.get(name)}, not {shapes.get(name)}"
            if name not in found:
                difference = f"{name} is missing"
            elif name not in shapes:
                difference = f"{name:.100} is unknown"
            raise UserError(f"the weights in the checkpoint do not fit its config ({difference}): "
                            "it is damaged, or of another version")
    if not all(x.float().isfinite().all() for x in weights.values()):
        raise UserError("the weights in the checkpoint are not finite: go back to an older one")


def weight_source(model, state, initial):
    """A function (name, shape) -> values of a parameter, for distributed.shard. Without a state it
    is initial; with one it returns the checkpoint's values, or None if the checkpoint is sharded:
    restore reads those later."""
    if state is None:
        return initial
    weights = dict(state["model"])
    if not is_sharded(state):
        check_weights(model, weights)

    def stored(name, shape):
        return weights.get(name)

    return stored


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


def restore(config, state, model, optimizers):
    """Fills the optimizers of a resumed run, and its model where the checkpoint is sharded. The
    tensors in state are then freed: the model has its weights already."""
    if state is None:
        return
    if config.init_from == "resume":
        if is_sharded(state):
            load_sharded(config, model, optimizers, state)
        elif not config.eval_only:
            load_moments(model, optimizers, state)
    state.update(model={}, optimizer={})


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
        none_yet = not saved and state["step"] < MAX_SKIPS  # each step so far may have been skipped
        if not none_yet and saved.keys() != {name for name, _, _ in wanted}:
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
                key: placed(x.contiguous(), parameter) if x.dim() else x.to(parameter.device)
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


def load_sharded(config, model, optimizers, state):
    """Fills model and optimizers, split over any number of ranks, from the newest sharded
    checkpoint in out_dir. An evaluation needs the model alone."""
    import torch.distributed.checkpoint as dcp  # see shard in nanogqa/distributed.py

    folder = find_sharded(config.out_dir)
    steps = state["optimizer"]
    try:
        schema.check(steps, {str: schema.number}, "optimizer")
        for name, count in steps.items():
            check_count(count, state["step"], name)
    except ValueError as error:
        raise UserError(f"{folder / 'state.json'} is damaged ({one_line(error)}): start again with "
                        "--overwrite=True") from None
    wanted = list(optimized(model, optimizers))
    none_yet = not steps and state["step"] < MAX_SKIPS  # each step so far may have been skipped
    if not none_yet and len(steps) != len(wanted):
        raise UserError(f"{folder} holds moments of {len(steps)} parameters, and {len(wanted)} are "
                        "trained: leave trainable as it was, or restore the folder from a copy")
    parts = {f"model.{name}": x for name, x in model.state_dict().items()}
    try:
        for name, parameter, optimizer in wanted:
            if steps and not config.eval_only:
                first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
                step = torch.tensor(steps[name], device=parameter.device)
                optimizer.state[parameter] = dict(step=step, exp_avg=first, exp_avg_sq=second)
                parts |= {f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
        with warnings.catch_warnings(action="ignore"):
            dcp.load(parts, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except (dcp.api.CheckpointException, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = cause(error)
        if out_of_memory(reason) or lost(reason) or not isinstance(reason, Exception):
            raise reason from None
        if isinstance(reason, OSError):
            raise UserError(f"cannot read {folder} ({one_line(reason)}): check its permissions and "
                            "the disk") from None
        raise UserError(f"{folder} does not fit the model or is damaged ({one_line(reason)}): "
                        "restore it from a copy, or start again with --overwrite=True") from None
    for name, x in parts.items():
        if name.startswith("exp_avg_sq.") and (local(x) < 0).any():
            raise UserError(f"{name} in {folder} is below 0, which no step gives: start again with "
                            "--overwrite=True")
    if not all(local(x).isfinite().all() for x in parts.values()):
        raise UserError(f"the weights or moments in {folder} are not finite: start again with "
                        "--overwrite=True")
