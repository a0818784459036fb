"""Converts checkpoints to and from Hugging Face, and changes their number of key/value heads.

    python convert.py to_hf --out_dir=out/gqa --hf_dir=hf/gqa
    python convert.py from_hf --hf_dir=DIR --out_dir=out/llama
    python convert.py pool --out_dir=out/mha --n_kv_head=2 --new_dir=out/mha-to-gqa

Each command writes a new folder, completely or not at all. to_hf and from_hf need transformers.
"""
import contextlib
import dataclasses
import functools
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from model import GPT, GPTConfig
from nanogqa import checkpoint, costs, saver, schema
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
from nanogqa.files import write_json
from nanogqa.folder import path_of
from nanogqa.hf_tokenizer import (
    SPECIAL_IDS,
    compare_import,
    import_extra,
    import_transformers,
    read_json,
    read_tokenizer,
    write_tokenizer,
)
from nanogqa.runtime import check_memory
from nanogqa.schema import base_name
from nanogqa.tokenizer import (
    HF_TOKENIZER,
    copy_tokenizer,
    get_tokenizer,
    present_name,
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
    n_kv_head: int | None = None  # key/value heads of the new model; more than before: copies
    method: Method = "aligned"    # mean, first, random or aligned: rotate to agree, then average
    dataset: str | None = None    # aligned: weigh directions by inputs from it; None: all alike
    seed: int = 1337              # seed of method=random


# -- what a conversion can express ---------------------------------------------------------------

# A setting of GPTConfig that is in none of these tables must have its default, else check_settings
# refuses it by name. A new setting that changes the model needs an entry, and code that handles it.

# setting of GPTConfig -> key of config.json
SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_ff": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
MLA_SIZES = {
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "rope_head_dim": "qk_rope_head_dim",
    "nope_head_dim": "qk_nope_head_dim",
    "v_head_dim": "v_head_dim",
}
HF_KEYS = {
    "gqa": SIZES | {"head_dim": "head_dim"},
    "mla": SIZES | MLA_SIZES,
}
# setting of GPTConfig -> key of a RoPE scaling with rope_type llama3
ROPE_SCALING = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_block_size": "original_max_position_embeddings",
}
ROPE = {"rope_theta", *ROPE_SCALING}
WINDOWS = {"window", "global_every"}
FAMILY = {"attention", "qk_norm", "qkv_bias", *WINDOWS}  # these choose one of FAMILIES
TRAINING = {"dropout", "embed_std"}            # no effect on the trained function

# what to_hf can express, for each kind of attention
EXPORTABLE = {
    "gqa": {*HF_KEYS["gqa"], *ROPE, *FAMILY, *TRAINING},
    # head_dim has no effect beyond the defaults of MLA_SIZES
    "mla": {*HF_KEYS["mla"], *ROPE, *FAMILY, *TRAINING, "head_dim"} - WINDOWS,
}
# what pool has a rule for, and what does not concern key/value heads
POOLABLE = {*SIZES, *ROPE, *TRAINING, *WINDOWS, "head_dim", "qk_norm", "qkv_bias"}


@dataclass(frozen=True)
class Family:
    """A family of transformers: its class, and the settings of GPTConfig that it stands for."""
    architecture: str
    attention: str = "gqa"
    qk_norm: bool = False
    qkv_bias: bool = False
    windows: tuple[str, ...] = ("no",)  # in which layers: see windows_of


FAMILIES = {  # by model_type
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", windows=("no", "all")),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, windows=("no", "all", "some")),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, windows=("no", "all", "some")),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", attention="mla", qk_norm=True),
}
# deepseek_v3 is written but not read: its published models have experts
READABLE = ("llama", "mistral", "qwen2", "qwen3")


def check_settings(config, known, action):
    """UserError that names a setting of config that is off its default and not in known."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name not in known and value != default:
            raise UserError(
                f"{field.name}={value} cannot be {action}, since convert.py has no rule for it: "
                f"add one, or choose a model with {field.name}={default}"
            )


def windows_of(config):
    """In which layers of a GPTConfig attention has a window: no, all or some."""
    if config.window is None:
        return "no"
    if config.global_every:
        return "some"
    return "all"


def model_type_of(config):
    """The first model_type that computes what a GPTConfig describes. UserError without one."""
    if config.attention not in EXPORTABLE:
        raise UserError(
            f"attention={config.attention} cannot be exported, since convert.py has no rule for "
            f"it: add one, or choose a model with attention={' or '.join(EXPORTABLE)}"
        )
    check_settings(config, EXPORTABLE[config.attention], "exported")
    wanted = (config.attention, config.qk_norm, config.qkv_bias)
    alike = []
    for model_type, family in FAMILIES.items():
        if (family.attention, family.qk_norm, family.qkv_bias) == wanted:
            alike.append(model_type)
            if windows_of(config) in family.windows:
                return model_type
    if alike:
        raise UserError(
            f"window={config.window} in {windows_of(config)} layers cannot be exported, since "
            f"{' and '.join(alike)} have no such window: choose a model with a window in all "
            "layers or none, or with qk_norm or qkv_bias"
        )
    if config.attention == "mla":
        raise UserError(
            "attention=mla without qk_norm is not an architecture of Hugging Face: only one with "
            "qk_norm can be exported, since DeepSeek-V3 normalizes its latents"
        )
    raise UserError(
        "qk_norm with qkv_bias is not an architecture of Hugging Face: only a model with one of "
        "them can be exported"
    )


# -- folders and optional packages ---------------------------------------------------------------

def new_folder(folder, key):
    """The absolute path of a folder to write, which the setting key names.

    Raises UserError if there is none, or if it is not empty. Each command calls this first, since
    the rest may take long.
    """
    if folder is None:
        raise UserError(f"there is no folder to write to: name a new one with --{key}=FOLDER")
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists, and nothing is overwritten: name another --{key}, or remove it first"
        )
    return folder


@contextlib.contextmanager
def whole(folder, key):
    """A temporary folder, renamed to folder on success and deleted on error: see new_folder."""
    folder = new_folder(folder, key)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}): make room, or name another --{key}"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_checkpoint(out_dir):
    """(state, model, folder) of the checkpoint in out_dir, the model in evaluation mode.

    folder is where the checkpoint's tokenizer is, as out_dir may name a file.
    """
    state = checkpoint.load(out_dir, GPTConfig)
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state)
    return state, model.eval(), path_of(out_dir).parent


def write(folder, state):
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


# -- to Hugging Face -----------------------------------------------------------------------------

def to_hf(config):
    """Writes a checkpoint as a folder that transformers loads, and compares the logits."""
    new_folder(config.hf_dir, "hf_dir")
    state, model, source = load_checkpoint(config.out_dir)
    model_type = model_type_of(model.config)
    import_transformers()
    tokenizer = None
    if state["tokenizer"] != "none":
        tokenizer = get_tokenizer(state["tokenizer"], source)
    with whole(config.hf_dir, "hf_dir") as folder:
        write_hf_weights(model, folder, config.dtype)
        write_hf_config(model_type, model.config, folder, config.dtype, tokenizer)
        if tokenizer is not None:
            sizes = {"model_type": model_type, "block_size": model.config.block_size}
            write_tokenizer(tokenizer, source, folder, sizes)
        compared = compare_logits(model, folder, config.dtype)
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


def hf_name(name):
    """The name in Llama, or DeepSeek-V3 for MLA, of a weight of model.py."""
    if name.startswith("lm_head"):
        return name
    for ours, theirs in (
        ("embed.", "embed_tokens."),
        ("attn_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        (".attn.", ".self_attn."),
        ("kv_a_proj", "kv_a_proj_with_mqa"),
        ("_a_norm", "_a_layernorm"),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}"


def interleave_rope(name, weight, config):
    """weight of a LatentAttention with its rotary rows in DeepSeek-V3's order.

    model.py rotates the pairs (i, i + P/2) of the P rotary rows of a head, as Llama does;
    DeepSeek-V3 rotates the pairs (2i, 2i + 1). Other weights are returned as they are.
    """
    P = config.rope_head_dim
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        width = config.nope_head_dim + P
    elif name.endswith("kv_a_proj.weight"):
        width = config.kv_lora_rank + P
    else:
        return weight
    order = torch.arange(P).view(2, -1).T.flatten()          # 0, P/2, 1, P/2 + 1, ...
    heads = weight.unflatten(0, (-1, width))                 # (heads, width, inputs)
    rotary = heads[:, -P:][:, order]
    return torch.cat((heads[:, :-P], rotary), 1).flatten(0, 1)


def write_hf_config(model_type, config, folder, dtype, tokenizer):
    """Writes a GPTConfig as config.json and generation_config.json."""
    transformers = import_transformers()
    values = {}
    for ours, theirs in HF_KEYS[config.attention].items():
        values[theirs] = getattr(config, ours)
    values |= window_keys(model_type, config)
    if config.attention == "mla":
        values["first_k_dense_replace"] = config.n_layer     # no layer has experts
        values["num_nextn_predict_layers"] = 0

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
            **values,
            **rope_keys(config),
            **special,
        )
    except Exception as error:  # its checks of sizes raise many kinds of errors
        raise UserError(
            f"transformers refuses the sizes of this model ({one_line(error)}): train a model with "
            "other sizes to export it"
        ) from None
    hf_config.save_pretrained(folder)
    # transformers 5 writes rope_parameters instead; without these keys, transformers 4 and other
    # readers would silently use default frequencies
    path = folder / "config.json"
    write_json(path, read_json(path, {}) | rope_keys(config))
    transformers.GenerationConfig(**special).save_pretrained(folder)


def window_keys(model_type, config):
    """The keys of config.json for windows, where the family has them."""
    if model_type == "mistral":
        return {"sliding_window": config.window}
    if config.window is None:
        return {}
    return {
        "sliding_window": config.window,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": layer_types(config.n_layer, config.global_every),
    }


def layer_types(n_layer, global_every):
    """layer_types of a config.json, where every so many layers one attends to all tokens."""
    types = []
    for number in range(1, n_layer + 1):
        if global_every and number % global_every == 0:
            types.append("full_attention")
        else:
            types.append("sliding_attention")
    return types


def rope_keys(config):
    """The keys of config.json for RoPE, as transformers 4 names them and 5 accepts them."""
    if config.rope_factor == 1:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    scaling = {"rope_type": "llama3"}
    for ours, theirs in ROPE_SCALING.items():
        scaling[theirs] = getattr(config, ours)
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def compare_logits(model, folder, dtype="float32", changes=None):
    """Compares model with the one that transformers loads from folder; one line with the result.

    changes are keys of config.json that are given to transformers with other values.
    The input is random ids at the positions 0 to block_size - 1, but not more of them than 2,048
    or, if that is more, 64 beyond the window.
    Raises UserError if the logits differ by more than rounding to dtype explains.
    """
    transformers = import_transformers()
    try:
        hf_config = transformers.AutoConfig.from_pretrained(folder)
        for key, value in (changes or {}).items():
            setattr(hf_config, key, value)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=hf_config, dtype=torch.float32, use_safetensors=True
        ).eval()
    except Exception as error:  # transformers raises many kinds of errors for a bad folder
        raise UserError(
            f"transformers cannot load {folder} ({one_line(error)}): update it, or fix the folder"
        ) from None
    length = min(max(2048, 64 + (model.config.window or 0)), model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        expected = theirs(ids).logits
        difference = (model(ids)[0] - expected).abs().max().item()
    largest = expected.abs().max().item()
    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[dtype] * max(1.0, largest)
    if not difference <= tolerance:  # also refuses NaN
        raise UserError(
            f"the logits of the converted model differ by {difference:.2g} from those of "
            "transformers, so nothing was written: use another checkpoint, since this one has "
            "something that the conversion does not represent"
        )
    return (
        f"largest logit difference to transformers {difference:.1e} (logits up to {largest:.1f}, "
        f"float32, positions 0 to {length - 1})"
    )


# -- from Hugging Face ---------------------------------------------------------------------------

def from_hf(config):
    """Writes a Hugging Face folder as a checkpoint, and compares the logits."""
    if config.hf_dir is None or not Path(config.hf_dir).is_dir():
        raise UserError(
            f"there is no folder {config.hf_dir}: name one that holds config.json and safetensors "
            "with --hf_dir"
        )
    new_folder(config.out_dir, "out_dir")
    hf_dir = Path(config.hf_dir)
    hf = read_json(hf_dir / "config.json", HF_CONFIG)
    gpt_config = model_config(hf, hf_dir / "config.json")
    state = {
        "model": read_weights(hf_dir, gpt_config),
        "config": asdict(gpt_config),
        "tokenizer": "none",
    }
    with whole(config.out_dir, "out_dir") as folder:
        warning = f"{hf_dir} has no {HF_TOKENIZER}, so {config.out_dir} has no tokenizer"
        if (hf_dir / HF_TOKENIZER).exists():
            tokenizer = read_tokenizer(hf_dir, hf, folder)
            state["tokenizer"] = tokenizer.name
            warning = compare_import(tokenizer, hf_dir)
        model = write(folder, state)
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


def list_of_text(value):
    """A list of text, or null."""
    if isinstance(value, list):
        return all(isinstance(element, str) for element in value)
    return value is None


def window_size(value):
    """A whole number, or null."""
    return value is None or schema.count(value)


# the part of config.json that is not checked as settings of GPTConfig are
HF_CONFIG = SPECIAL_IDS | {
    "layer_types?": list_of_text,
    "sliding_window?": window_size,
    "max_window_layers?": schema.count,
    "rope_parameters?": (dict, type(None)),
    "rope_scaling?": (dict, type(None)),
}


def rope_for_version_4(hf, config):
    """The keys of config.json that transformers 4 lacks in a file that version 5 saved."""
    version = import_transformers().__version__
    if int(version.split(".")[0]) < 5 and hf.get("rope_parameters"):
        return rope_keys(config)
    return {}


def model_config(hf, path):
    """The GPTConfig of the content of a config.json.

    Read as plain JSON: the classes of transformers silently give a missing size a default.
    UserError that names a key which is missing, or which model.py cannot represent.
    """
    model_type = hf.get("model_type")
    if model_type not in READABLE:
        raise UserError(
            f"{path}: model_type {model_type!r} is not known here, only {', '.join(READABLE)} are"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5, or 4
    for key, value in unrepresentable(hf, rope).items():
        raise refusal(path, key, value)

    # keys that a config may leave out, since all families have the same default
    given = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    for key, value in hf.items():
        if value is not None:
            given[key] = value
    if model_type == "llama":
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if model_type == "qwen3" and not given["head_dim"]:
        del given["head_dim"]  # Qwen3 has another default than n_embd / n_head
    settings = translated(HF_KEYS["gqa"], given, f"{path} lacks")
    settings["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    if rope_type_of(rope) == "llama3":
        settings |= translated(ROPE_SCALING, rope, f"{path}: the llama3 scaling lacks")
    settings["qk_norm"] = FAMILIES[model_type].qk_norm
    settings["qkv_bias"] = FAMILIES[model_type].qkv_bias
    settings = checkpoint.typed(GPTConfig, settings, path)
    try:
        config = build(GPTConfig, settings)
        return build(GPTConfig, settings | window_settings(hf, config.n_layer, path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def refusal(path, key, value):
    """The UserError about a key of a config.json that asks for something model.py lacks."""
    return UserError(
        f"{path}: {key}={value!s:.60} cannot be represented by this model: use another checkpoint"
    )


def window_settings(hf, n_layer, path):
    """The settings of GPTConfig for the windows of a config.json; none if it has no windows.

    UserError if its layers do not alternate as global_every says.
    """
    window = hf.get("sliding_window", 4096)  # the default of all three families
    types = types_of(hf, n_layer, window)
    if set(types) <= {"full_attention"}:
        return {}
    if window is not None and FAMILIES[hf["model_type"]].windows != ("no",):
        for global_every in range(n_layer + 1):
            if types == layer_types(n_layer, global_every):
                return {"window": window, "global_every": global_every}
    raise refusal(path, "layer_types", ", ".join(types))


def types_of(hf, n_layer, window):
    """The layer_types of a config.json, also where they follow from other keys."""
    local = layer_types(n_layer, 0)
    if hf["model_type"] == "mistral":
        return local if window else []
    if hf.get("layer_types"):
        return hf["layer_types"]
    if hf.get("use_sliding_window") and window:
        first = hf.get("max_window_layers", 28)  # the default of Qwen2 and Qwen3
        return ["full_attention"] * min(first, n_layer) + local[first:]
    return []


def translated(keys, given, complaint):
    """{setting: given[key]} for each setting and key. Raises UserError if one is missing."""
    settings = {}
    for setting, key in keys.items():
        if key not in given:
            raise UserError(f"{complaint} {key}: download it again")
        settings[setting] = given[key]
    return settings


def rope_type_of(rope):
    return rope.get("rope_type", rope.get("type", "default"))


def unrepresentable(hf, rope):
    """The keys of a config.json, with their values, that ask for something model.py lacks."""
    unknown = {}
    if rope_type_of(rope) not in ("default", "llama3"):
        unknown["rope_type"] = rope_type_of(rope)
    partial_rotary_factor = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1))
    if partial_rotary_factor != 1:
        unknown["partial_rotary_factor"] = partial_rotary_factor
    if not hf.get("use_sliding_window") and "sliding_attention" in (hf.get("layer_types") or []):
        unknown["layer_types"] = "sliding_attention, but use_sliding_window is not set"
    if hf.get("hidden_act", "silu") != "silu":
        unknown["hidden_act"] = hf["hidden_act"]
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if hf.get(key):
            unknown[key] = hf[key]
    return unknown


def read_weights(folder, config):
    """The float32 state dict of the safetensors in folder.

    UserError that names a tensor which is missing, unknown or of another shape.
    """
    files = weight_files(folder)
    shapes = {}  # of the tensors in the files, by name
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                shapes[name] = file.get_slice(name).get_shape()
    check_layers(folder, shapes, config.n_layer)
    expected = expected_weights(folder, config)
    for name in [*expected, *shapes]:
        check_tensor(folder, name, shapes, expected)
    numbers = sum(shape.numel() for _, shape in expected.values())
    check_memory({"the size of the model": 4 * numbers})
    weights = {}
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in expected:
                    weights[expected[name][0]] = file.get_tensor(name).float()
    return weights


def check_layers(folder, names, n_layer):
    """UserError unless n_layer layers are among the names: before a model of that size is made."""
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    if n_layer > len(layers):
        missing = next(i for i in range(n_layer) if str(i) not in layers)
        raise UserError(
            f"{folder} has no tensor model.layers.{missing}.*, but config.json promises {n_layer} "
            "layers: download both again"
        )


def check_tensor(folder, name, shapes, expected):
    """UserError unless the tensor called name is both in the files and expected, with one shape."""
    if name not in shapes:
        raise UserError(f"{folder} has no tensor {name}: download it again")
    if name not in expected:
        if name.endswith("rotary_emb.inv_freq"):
            return  # model.py computes it
        if name == "lm_head.weight":
            return  # tied: a copy of the embedding table
        raise UserError(
            f"{folder} holds {name}, which this model does not have: use another checkpoint"
        )
    shape = list(expected[name][1])
    if shapes[name] != shape:
        raise UserError(
            f"{folder}: {name} has shape {shapes[name]} where config.json promises {shape}: "
            "download both again"
        )


def expected_weights(folder, config):
    """{name in Hugging Face: (name in model.py, shape)} of the weights of a GPTConfig."""
    try:
        model = costs.meta_model(GPT, config)
    except UserError:
        raise UserError(
            f"{folder}/config.json asks for sizes that no machine can hold: download it again"
        ) from None
    return {hf_name(name): (name, weight.shape) for name, weight in model.state_dict().items()}


def weight_files(folder):
    """The paths of a folder's safetensors: one file, or those that an index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    file_of_tensor = read_json(index, {"weight_map": {str: base_name}})["weight_map"]
    return [folder / name for name in sorted(set(file_of_tensor.values()))]


@contextlib.contextmanager
def open_safetensors(path):
    """An open file of tensors. Raises UserError if it cannot be read."""
    safetensors = import_extra("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"{path} cannot be read ({one_line(error, 100)}): download it again; only safetensors "
            "are supported"
        ) from None


# -- key/value heads -----------------------------------------------------------------------------

def pool(config):
    """Writes a checkpoint with another number of key/value heads."""
    new_folder(config.new_dir, "new_dir")
    state, model, source = load_checkpoint(config.out_dir)
    before = model.config
    after = pooled_config(before, config)
    moments = [None] * before.n_layer
    if config.dataset is not None:
        moments = input_moments(model, pooling_inputs(state, before, config))
    fresh = None
    if config.method == "random":
        fresh = checkpoint.new_model(GPT, after, config.seed).state_dict()

    weights = dict(state["model"])
    for layer, moment in enumerate(moments):
        prefix = f"layers.{layer}.attn."
        heads = split_heads(weights, prefix, before)
        if after.n_kv_head >= before.n_kv_head:
            heads = pooling.copies(heads, after.n_kv_head)
        elif config.method == "mean":
            heads = pooling.mean(heads, after.n_kv_head)
        elif config.method == "first":
            heads = pooling.first(heads, after.n_kv_head)
        elif config.method == "aligned":
            heads = pooling.aligned(heads, after.n_kv_head, before.qk_norm, moment)
        else:
            drawn = split_heads(fresh, prefix, after)
            heads = pooling.Heads(heads.q, drawn.k, drawn.v, heads.o)
        weights |= join_heads(heads, prefix, before)

    with whole(config.new_dir, "new_dir") as folder:
        copy_tokenizer(state["tokenizer"], source, folder)
        new_state = {"model": weights, "config": asdict(after), "tokenizer": state["tokenizer"]}
        model = write(folder, new_state)
    print_pooled(before, config, model)


def pooled_config(before, config):
    """The GPTConfig of the new model. Raises UserError if the old one cannot be pooled."""
    if before.attention == "mla":
        raise UserError(
            f"{config.out_dir} has attention=mla, whose heads share one latent already: only a "
            "model with key/value heads can be pooled"
        )
    check_settings(before, POOLABLE, "pooled")
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


def pooling_inputs(state, before, config):
    """64 training sequences of config.dataset, (64, T) token ids, for a model of the GPTConfig
    before. T is its block_size, or about 2,048 if that is less.

    Raises UserError if the data set does not fit the model.
    """
    dataset = Dataset(config.dataset)
    theirs = dataset.meta["tokenizer"]
    ours = present_name(state["tokenizer"], path_of(config.out_dir).parent)
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


def split_heads(weights, prefix, config):
    """The pool.Heads of the attention layer whose weights start with prefix, in float64."""
    projections = []
    for name in ("q_proj", "k_proj", "v_proj"):
        x = weights[f"{prefix}{name}.weight"].double()
        if config.qkv_bias:
            bias = weights[f"{prefix}{name}.bias"].double()
            x = torch.cat((x, bias[:, None]), dim=1)
        projections.append(x.unflatten(0, (-1, config.head_dim)))
    o = weights[f"{prefix}o_proj.weight"].double()           # (C, H D)
    o = o.unflatten(1, (-1, config.head_dim)).permute(1, 0, 2)
    return pooling.Heads(*projections, o)


def join_heads(heads, prefix, config):
    """The float32 weights of an attention layer, by name: the inverse of split_heads."""
    weights = {}
    for name, x in (("q_proj", heads.q), ("k_proj", heads.k), ("v_proj", heads.v)):
        weight = x[..., :config.n_embd].flatten(0, 1)
        weights[f"{prefix}{name}.weight"] = weight.float().contiguous()
        if config.qkv_bias:
            weights[f"{prefix}{name}.bias"] = x[..., -1].flatten().float()
    o = heads.o.permute(1, 0, 2).flatten(1)
    weights[f"{prefix}o_proj.weight"] = o.float().contiguous()
    return weights


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


# -- commands ------------------------------------------------------------------------------------

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
