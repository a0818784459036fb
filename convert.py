"""Converts checkpoints to and from Hugging Face, and changes their number of key/value heads.

    python convert.py to_hf --out_dir=out/gqa --hf_dir=hf/gqa
    python convert.py from_hf --hf_dir=DIR --out_dir=out/llama
    python convert.py pool --out_dir=out/mha --n_kv_head=2 --new_dir=out/mha-to-gqa

Each command writes a new folder, completely or not at all. to_hf and from_hf need transformers.
"""
import contextlib
import functools
import os
import secrets
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from model import GPT, GPTConfig
from nanogqa import checkpoint, costs, saver
from nanogqa import pool as pooling
from nanogqa.configurator import (
    UserError,
    build,
    help_text,
    one_line,
    out_of_memory,
    parse,
    program,
)
from nanogqa.dataloader import Dataset, train_batch
from nanogqa.files import created, sync, write_json
from nanogqa.folder import path_of
from nanogqa.hf_model import (
    CONFIG_SCHEMA,
    FAMILIES,
    check_known,
    hf_name,
    interleave_rope,
    model_config,
    model_keys,
    model_type_of,
    read_weights,
    rope_keys,
)
from nanogqa.hf_tokenizer import (
    compare_import,
    import_extra,
    import_transformers,
    read_json,
    read_tokenizer,
    write_tokenizer,
)
from nanogqa.tokenizer import (
    HF_TOKENIZER,
    copy_tokenizer,
    get_tokenizer,
    name_today,
    stop_tokens,
)

Method = Literal["mean", "first", "random", "aligned"]


@dataclass
class ToHFConfig:
    out_dir: str = "out"          # folder of the run whose checkpoint is exported
    hf_dir: str | None = None     # folder to create
    dtype: Literal["float32", "bfloat16"] = "float32"  # data type of the exported weights


@dataclass
class FromHFConfig:
    hf_dir: str | None = None     # folder with config.json and safetensors
    out_dir: str | None = None    # folder to create, for train.py --init_from and sample.py


@dataclass
class PoolConfig:
    out_dir: str = "out"          # folder of the run whose heads are pooled
    new_dir: str | None = None    # folder to create, for train.py --init_from and sample.py
    n_kv_head: int | None = None  # key/value heads of the new model; if more than before, copies
    method: Method = "aligned"    # mean, first, random or aligned: rotate to agree, then average
    dataset: str | None = None    # aligned: weigh directions by inputs from it; None: all alike
    seed: int = 1337              # seed of method=random


# -- folders and optional packages -----------------------------------------------------------------

def new_folder(folder, key):
    """The absolute path of a folder to write, which the setting key names.

    Raises UserError if there is none, or if it is not empty. Each command calls this first, since
    the rest may take long.
    """
    if folder is None:
        raise UserError(f"there is no folder to write to: name a new one with --{key}=FOLDER")
    folder = Path(os.path.realpath(folder))
    if os.path.ismount(folder):
        raise UserError(f"{folder} is where a disk is mounted, which cannot be replaced: name a "
                        f"folder in it with --{key}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists, and nothing is overwritten: name another --{key}, or remove it first"
        )
    return folder


@contextlib.contextmanager
def replacing_folder(folder, key):
    """A temporary folder, renamed to folder on success and deleted on error: see new_folder."""
    folder = new_folder(folder, key)
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
    try:
        with created(folder.parent, key):
            try:
                part.mkdir()
                yield part
                for path in part.iterdir():
                    with open(path, "rb+") as file:
                        sync(file)  # before the folder gets its name
                os.replace(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if not Path(error.filename or part).is_relative_to(part):
            raise  # an input that cannot be read
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}): make room, or name another --{key}"
        ) from None


def load_checkpoint(out_dir):
    """(state, model, folder) of the checkpoint in out_dir, the model in evaluation mode.

    folder is where the checkpoint's tokenizer is, as out_dir may name a file.
    """
    state = checkpoint.load(out_dir, GPTConfig)
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state)
    state["optimizer"] = {}  # its moments are twice as large as the model
    return state, model.eval(), path_of(out_dir).parent


def write_checkpoint(folder, state):
    """Writes weights without a run as a checkpoint at step 0; returns their model.

    state holds model, config and tokenizer, as in checkpoint.KEYS.
    """
    untrained = {
        "optimizer": {},
        "settings": {},
        "runtime": {},
        "step": 0,
        "val_loss": None,
        "best_val_loss": None,
        "dataset_sha256": "",
    }
    state = untrained | state
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state)
    saver.save(folder, state)
    return model.eval()


# -- to Hugging Face -------------------------------------------------------------------------------

def to_hf(config):
    """Writes a checkpoint as a folder that transformers loads, and compares the logits."""
    new_folder(config.hf_dir, "hf_dir")
    state, model, source = load_checkpoint(config.out_dir)
    state["model"] = {}  # the model has the weights
    model_type = model_type_of(model.config)
    import_transformers()
    tokenizer = None
    if state["tokenizer"] != "none":
        tokenizer = get_tokenizer(state["tokenizer"], source)
    with replacing_folder(config.hf_dir, "hf_dir") as folder:
        write_hf_weights(model, folder, config.dtype)
        write_hf_config(model_type, model.config, folder, config.dtype, tokenizer)
        if tokenizer is not None:
            write_tokenizer(tokenizer, source, folder, model_type, model.config.block_size)
        model.to(getattr(torch, config.dtype)).float()  # in place: the weights in the files
        compared = compare_logits(model, folder, name=config.hf_dir)
    architecture = FAMILIES[model_type].architecture
    print(f"{config.hf_dir}: {architecture}, {costs.num_params(model):,} parameters in "
          f"{config.dtype}")
    print(compared)
    if tokenizer is None:
        print(
            f"warning: {config.out_dir} has no tokenizer, so {config.hf_dir} has none",
            file=sys.stderr,
        )


def write_hf_weights(model, folder, dtype):
    """Writes the weights of model as safetensors, with the names and the order of rows there."""
    weights = {}
    for name, weight in model.state_dict().items():
        if model.config.attention == "mla":
            weight = interleave_rope(name, weight, model.config)
        weights[hf_name(name)] = weight.to(getattr(torch, dtype))
    safetensors = import_extra("safetensors")
    try:
        import_extra("huggingface_hub").save_torch_state_dict(weights, folder)
    except safetensors.SafetensorError as error:  # its own error where the disk is full
        raise OSError(0, one_line(error, 100)) from None


def write_hf_config(model_type, config, folder, dtype, tokenizer):
    """Writes a GPTConfig as config.json and generation_config.json."""
    transformers = import_transformers()
    special = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        special["bos_token_id"] = getattr(tokenizer, "bos_token", tokenizer.eot_token)
        stops = stop_tokens(tokenizer)
        special["eos_token_id"] = stops
        if len(stops) == 1:
            special["eos_token_id"] = stops[0]

    try:
        hf_config = transformers.AutoConfig.for_model(
            model_type,
            architectures=[FAMILIES[model_type].architecture],
            dtype=dtype,
            **model_keys(model_type, config),
            **rope_keys(config),
            **special,
        )
    except Exception as error:  # its checks of sizes raise many kinds of errors
        raise UserError(
            f"transformers {transformers.__version__} refuses this model ({one_line(error)}): "
            "update it, or train a model with other sizes to export it"
        ) from None
    hf_config.save_pretrained(folder)
    # transformers 5 writes rope_parameters instead; without these keys, transformers 4 and other
    # readers would silently use default frequencies
    path = folder / "config.json"
    write_json(path, read_json(path, {}) | rope_keys(config))
    transformers.GenerationConfig(**special).save_pretrained(folder)


def compare_logits(model, folder, changes=None, name=None):
    """Compares model with the one that transformers loads from folder; one line with the result.

    changes: keys of config.json that transformers gets with these values instead. name: what
    messages call the folder, if it is a temporary one.
    The input is block_size random ids, or the larger of 2,048 and window + 64 if that is less.
    Raises UserError if the logits differ by more than the rounding of float32 explains.
    """
    transformers = import_transformers()
    length = min(max(2048, 64 + (model.config.window or 0)), model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    local = {"trust_remote_code": False, "local_files_only": True}
    try:
        hf_config = transformers.AutoConfig.from_pretrained(folder, **local)
        for key, value in (changes or {}).items():
            setattr(hf_config, key, value)
        hf_config.return_dict = True
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=hf_config, dtype=torch.float32, use_safetensors=True,
            attn_implementation="sdpa",  # a config.json may name code that would be downloaded
            **local,
        ).eval()
        with torch.inference_mode():
            expected = theirs(ids, use_cache=False).logits
    except Exception as error:  # transformers raises many kinds of errors for a bad folder
        if out_of_memory(error):
            raise
        raise UserError(
            f"transformers cannot load or run {name or folder} ({one_line(error)}): update it, or "
            "use another checkpoint"
        ) from None
    with torch.inference_mode():
        largest = expected.abs().max().item()
        difference = expected.sub_(model(ids)[0]).abs_().max().item()
    if not difference <= 1e-3 * max(1.0, largest):  # also refuses NaN
        raise UserError(
            f"the logits of the converted model differ by {difference:.2g} from those of "
            "transformers, so nothing was written: use another checkpoint, since this one has "
            "something that the conversion does not represent"
        )
    return (
        f"largest logit difference to transformers {difference:.1e} (logits up to {largest:.1f}, "
        f"float32, positions 0 to {length - 1})"
    )


# -- from Hugging Face -----------------------------------------------------------------------------

def from_hf(config):
    """Writes a Hugging Face folder as a checkpoint, and compares the logits."""
    if config.hf_dir is None:
        raise UserError("no model is named: name its folder with --hf_dir=FOLDER")
    if not Path(config.hf_dir).is_dir():
        raise UserError(
            f"there is no folder {config.hf_dir}: name one that holds config.json and safetensors "
            "with --hf_dir"
        )
    new_folder(config.out_dir, "out_dir")
    hf_dir = Path(config.hf_dir)
    hf = read_json(hf_dir / "config.json", CONFIG_SCHEMA)
    gpt_config = model_config(hf, hf_dir / "config.json", GPTConfig)
    import_transformers()
    with replacing_folder(config.out_dir, "out_dir") as folder:
        state = {
            "model": read_weights(hf_dir, gpt_config, GPT),
            "config": asdict(gpt_config),
            "tokenizer": "none",
        }
        warning = f"{hf_dir} has no {HF_TOKENIZER}, so {config.out_dir} has no tokenizer"
        if (hf_dir / HF_TOKENIZER).exists():
            tokenizer = read_tokenizer(hf_dir, hf, folder)
            state["tokenizer"] = tokenizer.name
            warning = compare_import(tokenizer, hf_dir)
        model = write_checkpoint(folder, state)
        del state["model"]  # the comparison loads the weights once more
        compared = compare_logits(model, hf_dir, changes=rope_for_version_4(hf, gpt_config))
    print(
        f"{config.out_dir}: {costs.num_params(model):,} parameters, n_head {gpt_config.n_head}, "
        f"n_kv_head {gpt_config.n_kv_head}, tokenizer {state['tokenizer']}"
    )
    print(compared)
    if warning is None:
        print("AutoTokenizer gives the same ids on all check texts")
    else:
        print(f"warning: {warning}", file=sys.stderr)


def rope_for_version_4(hf, config):
    """The keys of config.json that transformers 4 lacks in a file that version 5 saved."""
    version = import_transformers().__version__
    if int(version.split(".")[0]) < 5 and hf.get("rope_parameters"):
        return rope_keys(config)
    return {}


# -- key/value heads -------------------------------------------------------------------------------

# Settings that pool has a rule for, or that do not concern key/value heads. It refuses a model with
# another setting that is off its default.
POOLABLE = {
    "vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ff",
    "rope_theta", "rope_factor", "rope_original_block_size", "rope_low_freq_factor",
    "rope_high_freq_factor", "norm_eps", "qk_norm", "qkv_bias", "window", "global_every",
    "tie_embeddings", "embed_std", "dropout",
}


def pool(config):
    """Writes a checkpoint with another number of key/value heads."""
    new_folder(config.new_dir, "new_dir")
    state, model, source = load_checkpoint(config.out_dir)
    if state["tokenizer"].startswith(HF_TOKENIZER):
        get_tokenizer(state["tokenizer"], source)  # refuses a checkpoint without its tokenizer
    before = model.config
    after = pooled_config(before, config)
    moments = [None] * before.n_layer
    if config.dataset is not None:
        moments = input_moments(model, pooling_inputs(state, source, before, config))
    fresh = None
    if config.method == "random" and after.n_kv_head < before.n_kv_head:
        fresh = checkpoint.new_model(GPT, after, config.seed).state_dict()

    weights = dict(state["model"])
    for layer, moment in enumerate(moments):
        prefix = f"layers.{layer}.attn."
        heads = pooling.split_heads(weights, prefix, before)
        if after.n_kv_head >= before.n_kv_head:
            heads = pooling.copies(heads, after.n_kv_head)
        elif config.method == "mean":
            heads = pooling.mean(heads, after.n_kv_head)
        elif config.method == "first":
            heads = pooling.first(heads, after.n_kv_head)
        elif config.method == "aligned":
            heads = pooling.aligned(heads, after.n_kv_head, before.qk_norm, moment)
        else:
            drawn = pooling.split_heads(fresh, prefix, after)
            heads = pooling.Heads(heads.q, drawn.k, drawn.v, heads.o)
        weights |= pooling.join_heads(heads, prefix, before)

    with replacing_folder(config.new_dir, "new_dir") as folder:
        copy_tokenizer(state["tokenizer"], source, folder)
        new_state = {"model": weights, "config": asdict(after), "tokenizer": state["tokenizer"]}
        model = write_checkpoint(folder, new_state)
    print_pooled(before, config, model)


def pooled_config(before, config):
    """The GPTConfig of the new model. Raises UserError if the old one cannot be pooled."""
    if before.attention == "mla":
        raise UserError(
            f"{config.out_dir} has attention=mla, whose heads share one latent already: only a "
            "model with key/value heads can be pooled"
        )
    check_known(before, POOLABLE, "pooled")
    if config.n_kv_head is None:
        raise UserError("the new number of key/value heads is missing: pass --n_kv_head")
    after = build(GPTConfig, asdict(before) | {"n_kv_head": config.n_kv_head})
    old, new = before.n_kv_head, after.n_kv_head
    if old % new and new % old:
        raise UserError(
            f"{config.out_dir} has {old} key/value heads, which {new} neither divides nor is a "
            "multiple of: choose another --n_kv_head"
        )
    if config.dataset is not None and new >= old:
        raise UserError(
            f"heads are copied from {old} to {new}, which uses no data: leave --dataset out, or "
            "choose fewer heads"
        )
    if config.dataset is not None and config.method != "aligned":
        raise UserError(
            f"--method={config.method} uses no data: leave --dataset out, or choose "
            "--method=aligned"
        )
    return after


def pooling_inputs(state, source, before, config):
    """64 training sequences of config.dataset, (64, T) token ids, for a model of the GPTConfig
    before. T is its block_size, or about 2,048 if that is less. source is the checkpoint's folder.

    Raises UserError if the data set does not fit the model.
    """
    dataset = Dataset(config.dataset)
    theirs = dataset.meta["tokenizer"]
    ours = name_today(state["tokenizer"], source, theirs)
    if theirs != ours:
        raise UserError(
            f"{dataset.folder} has tokenizer {theirs!r}, the checkpoint {ours!r}: pass a data set "
            "with the checkpoint's tokenizer, or no --dataset"
        )
    unit = dataset.train.sequence_length or 1
    length = max(1, min(before.block_size, 2048) // unit) * unit
    ids, tokens = dataset.meta["vocab_size"], dataset.train.n_tokens
    reason = None
    if ids > before.vocab_size:
        reason = f"{ids} token ids, and the model {before.vocab_size}"
    elif length > before.block_size:
        reason = f"sequences of {unit} tokens, and the model a context of {before.block_size}"
    elif tokens <= length:
        reason = f"{tokens} training tokens, of {length + 1} that are needed"
    if reason:
        raise UserError(
            f"{dataset.folder} has {reason}: pass another data set, or no --dataset"
        )
    inputs, _ = train_batch(dataset.train, 0, 0, 64, length)
    return torch.from_numpy(inputs)


@torch.inference_mode()
def input_moments(model, ids):
    """For each layer, the mean of x x^T over the inputs x of its attention, (C, C).

    With biases x ends in a 1, as pool.Heads asks for. ids are (sequences, T).
    """
    sums = [0.0] * len(model.layers)

    def add_moment(layer, module, args, x):
        x = x[0].double()                                    # (T, C)
        if model.config.qkv_bias:
            x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
        sums[layer] += x.T @ x

    hooks = []
    for layer, block in enumerate(model.layers):
        add = functools.partial(add_moment, layer)
        hooks.append(block.attn_norm.register_forward_hook(add))
    for sequence in ids:  # one at a time: all at once may not fit into memory
        model(sequence[None], logits="none")
    for hook in hooks:
        hook.remove()
    return [total / ids.numel() for total in sums]


def print_pooled(before, config, model):
    old, new = before.n_kv_head, model.config.n_kv_head
    how = "copied"
    if new < old:
        how = f"pooled by {config.method}"
    print(
        f"{config.new_dir}: {old} key/value heads {how} to {new}, {costs.num_params(model):,} "
        f"parameters, KV cache {costs.kv_bytes_per_token(model.config):,} bytes per token in "
        "float32"
    )
    if before.qk_norm and config.method == "aligned" and new < old:
        print(
            "qk_norm: keys were aligned by sign alone, since other rotations do not commute with "
            "the norm's weights"
        )


# -- commands --------------------------------------------------------------------------------------

COMMANDS = {
    "to_hf": (to_hf, ToHFConfig),
    "from_hf": (from_hf, FromHFConfig),
    "pool": (pool, PoolConfig),
}


@program
def main(argv):
    doc = __doc__.strip()
    if argv[:1] in (["--help"], ["-h"]):
        print(doc)
        for name, (_, settings_class) in COMMANDS.items():
            print(f"\n{help_text(settings_class, name)}")
        return
    commands = ", ".join(COMMANDS)
    if not argv:
        raise UserError(f"no conversion given: begin with {commands}")
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown conversion {argv[0]!r}: begin with {commands}")
    command, settings_class = COMMANDS[argv[0]]
    settings = parse(settings_class, argv[1:], f"{doc}\n\n{argv[0]}")
    command(build(settings_class, settings))


if __name__ == "__main__":
    main()
