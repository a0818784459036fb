"""Models in Hugging Face's folders: config.json as a GPTConfig, safetensors as weights of model.py.

convert.py uses it. It needs the optional package safetensors.
"""
import contextlib
from dataclasses import dataclass, fields

import torch

from nanogqa import checkpoint, costs, schema
from nanogqa.configurator import UserError, build, one_line, out_of_memory
from nanogqa.hf_tokenizer import SPECIAL_IDS, import_extra, read_json
from nanogqa.runtime import check_memory
from nanogqa.schema import base_name

# -- what a conversion can express -----------------------------------------------------------------

# A setting of GPTConfig that is in none of these tables must have its default, else check_known
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


def windows_of(config):
    """In which layers of a GPTConfig attention has a window: no, all or some."""
    windows = {spec.window for spec in config.cache_specs()}
    if windows == {None}:
        return "no"
    if None in windows:
        return "some"
    return "all"


def check_known(config, known, action):
    """Raises UserError that names a setting which is off its default and not in known."""
    for field in fields(config):
        value, default = getattr(config, field.name), field.default
        if field.name not in known and value != default:
            raise UserError(f"{field.name}={value} cannot be {action}, since convert.py has no "
                            f"rule for it: add one, or choose a model with {field.name}={default}")


def model_type_of(config):
    """The first model_type that computes what a GPTConfig describes. UserError without one."""
    if config.attention not in EXPORTABLE:
        raise UserError(
            f"attention={config.attention} cannot be exported, since convert.py has no rule for "
            f"it: add one, or choose a model with attention={' or '.join(EXPORTABLE)}"
        )
    check_known(config, EXPORTABLE[config.attention], "exported")
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


# -- to Hugging Face -------------------------------------------------------------------------------

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


def model_keys(model_type, config):
    """The keys of config.json for a GPTConfig that model_type can express, RoPE apart."""
    keys = {}
    for ours, theirs in HF_KEYS[config.attention].items():
        keys[theirs] = getattr(config, ours)
    if config.attention == "mla":
        keys["first_k_dense_replace"] = config.n_layer       # no layer has experts
        keys["num_nextn_predict_layers"] = 0
    return keys | window_keys(model_type, config)


def window_keys(model_type, config):
    """The keys of config.json for windows, where the family has them."""
    if model_type == "mistral":
        return {"sliding_window": config.window}
    if windows_of(config) == "no":
        return {}
    return {
        "sliding_window": config.window,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": layer_types(config),
    }


def layer_types(config):
    """The layer_types of a config.json for a GPTConfig."""
    types = []
    for spec in config.cache_specs():
        if spec.window is None:
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


# -- from Hugging Face -----------------------------------------------------------------------------

def list_of_text(value):
    """A list of text, or null."""
    if isinstance(value, list):
        return all(isinstance(element, str) for element in value)
    return value is None


def window_size(value):
    """A whole number, or null."""
    return value is None or schema.count(value)


# the part of config.json that is not checked as settings of GPTConfig are
CONFIG_SCHEMA = SPECIAL_IDS | {
    "layer_types?": list_of_text,
    "sliding_window?": window_size,
    "max_window_layers?": schema.count,
    "rope_parameters?": (dict, type(None)),
    "rope_scaling?": (dict, type(None)),
}


def model_config(hf, path, GPTConfig):
    """The GPTConfig of the content of a config.json.

    Read as plain JSON: the classes of transformers silently give a missing size a default.
    UserError that names a key which is missing, or which model.py cannot represent.
    """
    model_type = hf.get("model_type")
    if model_type not in READABLE:
        raise UserError(
            f"{path}: model_type {model_type!r:.60} cannot be imported: use a checkpoint of one of "
            f"{', '.join(READABLE)}"
        )
    # transformers 4 knows rope_scaling; 5 writes rope_parameters, but prefers rope_scaling to it
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    unknown = unrepresentable(hf, rope)
    if unknown:
        key = next(iter(unknown))
        raise refusal(path, key, unknown[key])

    # keys that a config may leave out, since all families have the same default
    given = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    for key, value in hf.items():
        if value is not None:
            given[key] = value
    if model_type == "llama" or hf.get("num_key_value_heads", 0) is None:
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if model_type == "qwen3" and not given["head_dim"]:
        del given["head_dim"]  # Qwen3 has another default than n_embd / n_head
    settings = translated(HF_KEYS["gqa"], given, f"{path} lacks")
    settings["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    if rope_type_of(rope) == "llama3":
        rope = {"original_max_position_embeddings": hf.get("max_position_embeddings")} | rope
        settings |= translated(ROPE_SCALING, rope, f"{path}: the llama3 scaling lacks")
    settings["qk_norm"] = FAMILIES[model_type].qk_norm
    settings["qkv_bias"] = FAMILIES[model_type].qkv_bias
    settings = checkpoint.typed(GPTConfig, settings, path)
    window = hf.get("sliding_window", 4096)  # the default of Mistral, Qwen2 and Qwen3
    try:
        n_layer = build(GPTConfig, settings).n_layer  # checked, before lists of that length
        types = types_of(hf, n_layer, window)
        if len(types) != n_layer:
            raise UserError(f"num_hidden_layers={n_layer}, but layer_types lists {len(types)}: "
                            "download it again")
        config = build(GPTConfig, settings | window_settings(hf, types, window))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if layer_types(config) != types:
        raise refusal(path, "layer_types", ", ".join(types))
    return config


def refusal(path, key, value):
    """The UserError about a key of a config.json that asks for something model.py lacks."""
    return UserError(
        f"{path}: {key}={value!s:.60} cannot be represented by this model: use another checkpoint"
    )


def window_settings(hf, types, window):
    """The settings of GPTConfig for windows, {} without any. types are those of types_of; where
    they do not alternate as global_every can say, layer_types of the settings differs from them."""
    windowless = window is None or FAMILIES[hf["model_type"]].windows == ("no",)
    if windowless or "sliding_attention" not in types:
        return {}
    global_every = 0
    if "full_attention" in types:
        global_every = types.index("full_attention") + 1
    return {"window": window, "global_every": global_every}


def types_of(hf, n_layer, window):
    """The layer_types of a config.json, also where they follow from other keys."""
    local, full = ["sliding_attention"], ["full_attention"]
    if hf["model_type"] == "mistral":
        return (local if window else full) * n_layer
    if hf.get("layer_types"):
        return hf["layer_types"]
    if hf.get("use_sliding_window") and window:
        first = min(hf.get("max_window_layers", 28), n_layer)  # the default of Qwen2 and Qwen3
        return full * first + local * (n_layer - first)
    return full * n_layer


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
    partial_rotary_factor = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial_rotary_factor not in (None, 1):
        unknown["partial_rotary_factor"] = partial_rotary_factor
    if not hf.get("use_sliding_window") and "sliding_attention" in (hf.get("layer_types") or []):
        unknown["layer_types"] = "sliding_attention, but use_sliding_window is not set"
    if hf.get("hidden_act", "silu") != "silu":
        unknown["hidden_act"] = hf["hidden_act"]
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if hf.get(key):
            unknown[key] = hf[key]
    return unknown


def read_weights(folder, config, GPT):
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
    expected = expected_weights(folder, config, GPT)
    for name in [*expected, *shapes]:
        check_tensor(folder, name, shapes, expected)
    numbers = sum(shape.numel() for _, shape in expected.values())
    check_memory({"the size of the model by choosing another checkpoint": 4 * numbers})
    weights = {}
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in expected:
                    weight = file.get_tensor(name).float()
                    if not weight.isfinite().all():
                        raise UserError(f"{folder}: {name} has values that are not finite: "
                                        "download it again, or use another checkpoint")
                    weights[expected[name][0]] = weight
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


def expected_weights(folder, config, GPT):
    """{name in Hugging Face: (name in model.py, shape)} of the weights of a GPTConfig."""
    try:
        model = costs.meta_model(GPT, config)
    except UserError:
        raise UserError(
            f"{folder}/config.json asks for sizes that no machine can hold: download it again"
        ) from None
    return {hf_name(name): (name, weight.shape) for name, weight in model.state_dict().items()}


def weight_files(folder):
    """The paths of a folder's safetensors: one file, or else those that an index names, as
    transformers chooses."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
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


