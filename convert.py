"""Turns checkpoints into Hugging Face folders and back, and changes their number of key/value heads.

    python convert.py to_hf --out_dir=out/gqa --hf_dir=hf/gqa
    python convert.py from_hf --hf_dir=DIR --out_dir=out/llama
    python convert.py pool --out_dir=out/mha --n_kv_head=2 --new_dir=out/mha-to-gqa

A folder is written whole or not at all, and none is overwritten. The first two need transformers.
"""
import contextlib
import json
import os
import shutil
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch

from nanogqa import checkpoint
from nanogqa.configurator import UserError, build, help_text, parse, program
from nanogqa.dataloader import Dataset, train_batch
from nanogqa.tokenizer import EOT, HF_TOKENIZER, HuggingFaceTokenizer, UNICODE_OF_BYTE, copy_tokenizer, get_tokenizer
from model import GPT, GPTConfig


@dataclass
class ToHFConfig:
    out_dir: str = "out"          # folder with the ckpt.pt of a run
    hf_dir: str | None = None     # folder to make
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in it


@dataclass
class FromHFConfig:
    hf_dir: str | None = None     # folder with config.json and safetensors
    out_dir: str | None = None    # folder to make, for train.py --init_from and sample.py


@dataclass
class PoolConfig:
    out_dir: str = "out"          # folder with the ckpt.pt of a run
    new_dir: str | None = None    # folder to make, for train.py --init_from and sample.py
    n_kv_head: int | None = None  # key/value heads that the new model has: fewer are pooled, more are copies
    method: Literal["mean", "first", "random", "aligned"] = "aligned"  # mean of the heads, the first, a new one, or aligned
    dataset: str | None = None    # for aligned: a data set whose text says which inputs matter; None: all alike
    seed: int = 1337              # of the draws of random


@contextlib.contextmanager
def whole(folder, key):
    """A folder to write into, which takes its name at the end and leaves nothing after an error."""
    if folder is None:
        raise UserError(f"there is no folder to write to: name a new one with --{key}=FOLDER")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists, and nothing is overwritten: name another --{key}, or remove it first")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error}): make room, or name another --{key}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


# -- Hugging Face ------------------------------------------------------------------------------------------------------------

# model_type -> (architecture, qk_norm, qkv_bias)
FAMILIES = {"llama": ("LlamaForCausalLM", False, False), "mistral": ("MistralForCausalLM", False, False),
            "qwen2": ("Qwen2ForCausalLM", False, True), "qwen3": ("Qwen3ForCausalLM", True, False)}
# ours -> theirs
SIZES = dict(vocab_size="vocab_size", n_embd="hidden_size", n_ff="intermediate_size", n_layer="num_hidden_layers",
             n_head="num_attention_heads", block_size="max_position_embeddings", n_kv_head="num_key_value_heads",
             head_dim="head_dim", norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings")
MLA = dict(kv_lora_rank="kv_lora_rank", q_lora_rank="q_lora_rank", rope_head_dim="qk_rope_head_dim",
           nope_head_dim="qk_nope_head_dim", v_head_dim="v_head_dim")
LLAMA3 = dict(rope_factor="factor", rope_low_freq_factor="low_freq_factor", rope_high_freq_factor="high_freq_factor",
              rope_original_block_size="original_max_position_embeddings")


def hf_name(name):
    """The name of a weight of model.py in Hugging Face's Llama, or DeepSeek-V3 for mla."""
    for ours, theirs in (("embed.", "embed_tokens."), ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"),
                         (".attn.", ".self_attn."), ("kv_a_proj", "kv_a_proj_with_mqa"), ("_a_norm", "_a_layernorm")):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_weights(weights, c):
    """weights by Hugging Face's names. Llama turns halves in RoPE, too; DeepSeek-V3 neighbours, so those rows change places."""
    if c.attention == "mla":
        P, weights = c.rope_head_dim, dict(weights)
        turn = torch.arange(P).view(2, -1).T.flatten()                  # 0, P/2, 1, P/2 + 1, ...
        for name, x in weights.items():
            if name.endswith(("q_proj.weight", "q_b_proj.weight", "kv_a_proj.weight")):
                x = x.unflatten(0, (-1, c.kv_lora_rank + P if "kv_a" in name else c.nope_head_dim + P))
                weights[name] = torch.cat((x[:, :-P], x[:, -P:][:, turn]), 1).flatten(0, 1)
    return {hf_name(name): x for name, x in weights.items()}


def library(name):
    """The module of that name, which the extra [hf] installs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        module = __import__(name)
    except ImportError:
        raise UserError(f"{name} is not installed: pip install transformers safetensors") from None
    if name == "transformers":
        module.utils.logging.disable_progress_bar()
        module.utils.logging.set_verbosity_error()
    return module


def to_hf(config):
    state = checkpoint.load(config.out_dir, GPTConfig)
    model, c = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state).eval(), GPTConfig(**state["config"])
    if c.qk_norm and c.qkv_bias:
        raise UserError("qk_norm with qkv_bias is no architecture of Hugging Face: only a model with one of them can be exported")
    if c.attention == "mla" and not c.qk_norm:
        raise UserError("attention=mla without qk_norm is no architecture of Hugging Face: DeepSeek-V3 norms its latents")
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    architecture, more = FAMILIES[family][0], {}
    if c.attention == "mla":  # every layer is one of the first, dense ones, before any experts
        family, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"
        more = {theirs: getattr(c, ours) for ours, theirs in MLA.items()} | dict(
            head_dim=c.rope_head_dim, first_k_dense_replace=c.n_layer, num_nextn_predict_layers=0)
    save_torch_state_dict = (library("transformers"), library("huggingface_hub"))[1].save_torch_state_dict
    encoding = None if state["tokenizer"] == "none" else get_tokenizer(state["tokenizer"], config.out_dir)
    ends = {} if encoding is None else dict(eos_token_id=encoding.eot_token, bos_token_id=encoding.bos_token if
                                            isinstance(encoding, HuggingFaceTokenizer) else encoding.eot_token)
    scaling = dict(rope_type="llama3", **{theirs: getattr(c, ours) for ours, theirs in LLAMA3.items()}) if c.rope_factor > 1 else None
    described = dict(architectures=[architecture], model_type=family, hidden_act="silu",
                     **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()} | more, rope_theta=c.rope_theta, rope_scaling=scaling,
                     attention_bias=False, mlp_bias=False, use_sliding_window=False, torch_dtype=config.dtype, **ends)
    with whole(config.hf_dir, "hf_dir") as part:
        # a tied head is the embedding table: one of the two is written
        weights = hf_weights(model.state_dict(), c)
        save_torch_state_dict({name: x.to(getattr(torch, config.dtype)) for name, x in weights.items()}, part)
        (part / "config.json").write_text(json.dumps(described, indent=1))
        (part / "generation_config.json").write_text(json.dumps(ends, indent=1))
        copy_tokenizer(state["tokenizer"], config.out_dir, part)
        if isinstance(encoding, tiktoken.Encoding):
            hf_tokenizer(encoding).save(str(part / HF_TOKENIZER))
            (part / "tokenizer_config.json").write_text(json.dumps(dict(
                tokenizer_class="PreTrainedTokenizerFast", tiktoken=encoding.name, eos_token=EOT, bos_token=EOT, pad_token=EOT,
                clean_up_tokenization_spaces=False, model_max_length=c.block_size), indent=1))
            check_tokenizer(encoding, part)
        compared = compare_logits(model, part, config.dtype)
    print(f"{config.hf_dir}: {architecture}, {model.num_params():,} parameters in {config.dtype}\n{compared}")
    if encoding is None:
        print(f"warning: {config.out_dir} has no tokenizer, so {config.hf_dir} has none", file=sys.stderr)


def compare_logits(model, folder, dtype="float32"):
    """One line with the largest difference between model's logits and those of transformers' model in folder.

    Random ids at the positions 0 to block_size - 1, 2,048 of them at most. UserError where the two are not one model.
    """
    try:
        theirs = library("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    except Exception as error:  # whatever it does not like about a config or a file
        raise UserError(f"transformers cannot load {folder} ({' '.join(str(error).split())[:200]}): update it, or mend the folder") from None
    ids = torch.randint(model.config.vocab_size, (1, min(2048, model.config.block_size)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(ids).logits
        difference = (model(ids)[0] - expected).abs().max().item()
    largest = expected.abs().max().item()
    if not difference <= (1e-3 if dtype == "float32" else 0.1) * max(1.0, largest):
        raise UserError(f"the logits of the converted model differ by {difference:.2g} from those of transformers: its config.json "
                        "must ask for something that is not represented here; nothing was written")
    return (f"largest logit difference to transformers {difference:.1e} (logits up to {largest:.1f}, float32, "
            f"positions 0 to {ids.size(1) - 1})")


def hf_tokenizer(encoding):
    """The tokenizers.Tokenizer that does what a tiktoken.Encoding does.

    tiktoken joins the neighbours whose union has the lowest id; as a list of pairs, that is every split of every token into
    two, in the order of their unions' ids.
    """
    tokenizers = library("tokenizers")
    ranks, text = encoding._mergeable_ranks, lambda token: "".join(UNICODE_OF_BYTE[byte] for byte in token)
    merges = [(text(token[:i]), text(token[i:])) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]
    vocab = {text(token): i for token, i in ranks.items()} | encoding._special_tokens
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = []
    if merges:
        # what their regular expressions call {1,3}+ is a repeated group; without the + it matches what tiktoken's does
        pattern = tokenizers.Regex(encoding._pat_str.replace("}+", "}"))
        split = [tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        *split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True)
                                  for name in sorted(encoding._special_tokens, key=encoding._special_tokens.get)])
    return tokenizer


def check_tokenizer(encoding, folder):
    """UserError unless transformers reads the same ids, and the text again, from program text and from all kinds of letters."""
    theirs = library("transformers").AutoTokenizer.from_pretrained(folder)
    letters = "".join(chr(i) + (" " if i % 7 == 0 else "") for i in [*range(0x3000), *range(0x1F600, 0x1F640)])
    for text in (Path(__file__).read_text(), f"it's 1234567 \n\n  DON'T\t{EOT} \r\n x", letters):
        ids = encoding.encode(text, allowed_special="all")
        if theirs(text, add_special_tokens=False)["input_ids"] != ids or theirs.decode(ids) != encoding.decode(ids):
            raise UserError(f"transformers does not read tokenizer {encoding.name!r} as tiktoken does: report it, and use another")


def read_json(path):
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name a folder of Hugging Face's with --hf_dir") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: fetch it again")
    return value


def model_config(hf, path):
    """The GPTConfig of a config.json. UserError that names what this model does not have."""
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not known here, only {', '.join(FAMILIES)} are")
    _, qk_norm, qkv_bias = FAMILIES[family]
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is no JSON object: fetch it again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    window = hf.get("sliding_window") if family == "mistral" or hf.get("use_sliding_window") else None
    layer_types = [kind for kind in hf.get("layer_types") or [] if kind != "full_attention"]
    refused = dict(rope_type=kind not in ("default", "llama3") and kind, sliding_window=window,
                   layer_types=layer_types and layer_types[0], attention_bias=hf.get("attention_bias"), mlp_bias=hf.get("mlp_bias"),
                   hidden_act=hf.get("hidden_act", "silu") != "silu" and hf["hidden_act"],
                   partial_rotary_factor=rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)) != 1,
                   quantization_config=hf.get("quantization_config") and hf["quantization_config"])
    for key, value in refused.items():
        if value:
            raise UserError(f"{path}: {key}={value!s:.60} cannot be represented by this model: use another checkpoint")
    # where the classes of transformers have one default in common, a config may leave the key out
    given = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False} | {key: value for key, value in hf.items() if value is not None}
    if family == "llama":
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if missing := [key for key in SIZES.values() if key not in given or (key == "head_dim" and family == "qwen3" and not given[key])]:
        raise UserError(f"{path} lacks {missing[0]}: fetch it again")
    values = {ours: given[theirs] for ours, theirs in SIZES.items()}
    values |= dict(rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)), qk_norm=qk_norm, qkv_bias=qkv_bias)
    if kind == "llama3":
        if missing := [key for key in LLAMA3.values() if key not in rope]:
            raise UserError(f"{path}: the llama3 scaling lacks {missing[0]}: fetch it again")
        values |= {ours: rope[theirs] for ours, theirs in LLAMA3.items()}
    return build(GPTConfig, checkpoint.typed(GPTConfig, values, path))


def read_weights(folder, config):
    """The state dict, in float32, of the safetensors in folder. UserError that names a tensor missing, left over or misshapen."""
    safetensors = library("safetensors")
    index = folder / "model.safetensors.index.json"
    names = read_json(index).get("weight_map") if index.exists() else None
    files = sorted(set(map(str, names.values()))) if isinstance(names, dict) else ["model.safetensors"]
    try:
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in GPT(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError):
        raise UserError(f"{folder}/config.json asks for sizes that no machine can hold: fetch it again") from None
    wanted, weights = {hf_name(name): name for name in shapes}, {}
    for file in files:
        path = folder / os.path.basename(file)
        try:
            with safetensors.safe_open(path, framework="pt") as f:
                for theirs in f.keys():
                    if theirs.endswith("rotary_emb.inv_freq") or (theirs == "lm_head.weight" and config.tie_embeddings):
                        continue  # a table that is computed here, and a copy of the embedding table
                    if theirs not in wanted:
                        raise UserError(f"{path} holds {theirs}, which this model does not have: use another checkpoint")
                    name, tensor = wanted[theirs], f.get_tensor(theirs)
                    if tensor.shape != shapes[name]:
                        raise UserError(f"{path}: {theirs} has shape {list(tensor.shape)} where config.json promises "
                                        f"{list(shapes[name])}: fetch both again")
                    weights[name] = tensor.float()
        except (OSError, safetensors.SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}): fetch it again; other formats than "
                            "safetensors are not read") from None
    if missing := [theirs for theirs, name in wanted.items() if name not in weights]:
        raise UserError(f"{folder} has no tensor {missing[0]}: fetch it again")
    return weights


def from_hf(config):
    if config.hf_dir is None or not Path(config.hf_dir).is_dir():
        raise UserError(f"there is no folder {config.hf_dir}: name one that holds config.json and safetensors with --hf_dir")
    folder = Path(config.hf_dir)
    hf = read_json(folder / "config.json")
    gpt_config = model_config(hf, folder / "config.json")
    state = dict(model=read_weights(folder, gpt_config), config=asdict(gpt_config), tokenizer="none")
    with whole(config.out_dir, "out_dir") as part:
        if (folder / HF_TOKENIZER).exists():
            state["tokenizer"] = read_tokenizer(folder, hf, part)
        model = write(part, state)
        compared = compare_logits(model, folder)
    print(f"{config.out_dir}: {model.num_params():,} parameters, n_head {gpt_config.n_head}, n_kv_head {gpt_config.n_kv_head}, "
          f"tokenizer {state['tokenizer']}\n{compared}")
    if state["tokenizer"] == "none":
        print(f"warning: {folder} has no {HF_TOKENIZER}, so {config.out_dir} has no tokenizer", file=sys.stderr)


def read_tokenizer(folder, hf, part):
    """The name of the tokenizer in folder, copied into part unless tiktoken has it."""
    path = folder / "tokenizer_config.json"
    about = read_json(path) if path.exists() else {}
    tokenizers = library("tokenizers")
    try:
        theirs = tokenizers.Tokenizer.from_file(str(folder / HF_TOKENIZER))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{folder / HF_TOKENIZER} cannot be read ({str(error)[:100]}): fetch it again") from None
    with contextlib.suppress(UserError, KeyError, TypeError):  # not an export of ours, or tiktoken's files are not here
        encoding = get_tokenizer(about["tiktoken"])
        if hf_tokenizer(encoding).to_str() == theirs.to_str():
            return encoding.name
    shutil.copy(folder / HF_TOKENIZER, part)
    for name in ("eos_token", "bos_token"):  # the ids in config.json are what the model was trained with
        ids = hf.get(f"{name}_id")
        token = theirs.id_to_token(ids[0] if isinstance(ids, list) else ids) if ids not in (None, []) else None
        about |= {} if token is None else {name: token}
    (part / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    return HuggingFaceTokenizer(part).name


def write(part, state):
    """Writes weights without a run, as a checkpoint at step 0; returns their model."""
    state = dict(optimizer={}, settings={}, runtime={}, step=0, val_loss=None, best_val_loss=None, dataset_sha256="") | state
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state).eval()
    checkpoint.save(part, state)
    return model


# -- key/value heads ---------------------------------------------------------------------------------------------------------

def pool(config):
    state = checkpoint.load(config.out_dir, GPTConfig)
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state).eval()
    before = GPTConfig(**state["config"])
    if before.attention == "mla":
        raise UserError(f"{config.out_dir} has attention=mla, whose heads share one latent already: only a model with key/value "
                        "heads can be pooled")
    if config.n_kv_head is None:
        raise UserError("the new number of key/value heads is missing: pass --n_kv_head")
    after = build(GPTConfig, asdict(before) | dict(n_kv_head=config.n_kv_head))
    K0, K = before.n_kv_head, after.n_kv_head
    if max(K0, K) % min(K0, K):
        raise UserError(f"{config.out_dir} has {K0} key/value heads, which {K} neither divides nor is a multiple of: choose "
                        "another --n_kv_head")
    if config.dataset is not None and config.method != "aligned":
        raise UserError(f"--method={config.method} looks at no data: leave --dataset out, or choose --method=aligned")
    fresh = checkpoint.new_model(GPT, after, config.seed).state_dict() if config.method == "random" else None
    moments = [] if config.dataset is None else input_moments(model, state, Dataset(config.dataset))
    weights = dict(state["model"])
    for layer in range(before.n_layer):
        prefix = f"layers.{layer}.attn."
        q, k, v, o = heads(weights, prefix, before)
        if K >= K0:
            k, v = k.repeat_interleave(K // K0, 0), v.repeat_interleave(K // K0, 0)
        elif config.method == "aligned":
            root, back = roots(moments[layer]) if moments else [torch.eye(k.size(-1), dtype=torch.float64)] * 2
            q, k, v, o = aligned(q @ root, k @ root, v @ root, o, K, before.qk_norm)
            q, k, v = q @ back, k @ back, v @ back
        elif config.method == "random":
            _, k, v, _ = heads(fresh, prefix, after)
        else:
            k, v = (x.unflatten(0, (K, K0 // K)) for x in (k, v))
            k, v = (k[:, 0], v[:, 0]) if config.method == "first" else (k.mean(1), v.mean(1))
        for name, x in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            weights[f"{prefix}{name}.weight"] = x[..., :before.n_embd].flatten(0, 1).float().contiguous()
            if before.qkv_bias:
                weights[f"{prefix}{name}.bias"] = x[..., -1].flatten().float()
        weights[f"{prefix}o_proj.weight"] = o.permute(1, 0, 2).flatten(1).float().contiguous()
    with whole(config.new_dir, "new_dir") as part:
        copy_tokenizer(state["tokenizer"], config.out_dir, part)
        model = write(part, dict(model=weights, config=asdict(after), tokenizer=state["tokenizer"]))
    how = "copied" if K >= K0 else f"pooled by {config.method}"
    print(f"{config.new_dir}: {K0} key/value heads {how} to {K}, {model.num_params():,} parameters, KV cache "
          f"{model.kv_bytes_per_token():,} bytes per token in float32")
    if before.qk_norm and config.method == "aligned" and K < K0:
        print("qk_norm: keys were aligned by sign alone, since other rotations do not pass through the norm's weights")


def heads(weights, prefix, config):
    """A layer's (H, D, C) queries, (K, D, C) keys and values, and (H, C, D) outputs; a bias is one more column, behind C."""
    def rows(name):
        x = weights[f"{prefix}{name}.weight"].double()
        if config.qkv_bias:
            x = torch.cat((x, weights[f"{prefix}{name}.bias"].double()[:, None]), dim=1)
        return x.unflatten(0, (-1, config.head_dim))
    o = weights[f"{prefix}o_proj.weight"].double().unflatten(1, (-1, config.head_dim))
    return rows("q_proj"), rows("k_proj"), rows("v_proj"), o.permute(1, 0, 2)


@torch.inference_mode()
def input_moments(model, state, dataset):
    """Of each layer, the mean of x x^T over the inputs x of its attention, (C, C); with biases x ends in a 1. 64 windows."""
    if dataset.meta["tokenizer"] != state["tokenizer"]:
        raise UserError(f"{dataset.folder} is of tokenizer {dataset.meta['tokenizer']!r}, the checkpoint of {state['tokenizer']!r}: "
                        "pass a data set of that tokenizer, or no --dataset")
    moments = []

    def add(module, args, x):
        x = x.flatten(0, -2).double()
        x = torch.cat((x, torch.ones(len(x), 1)), dim=1) if model.config.qkv_bias else x
        moments.append(x.T @ x / len(x))
    handles = [block.attn_norm.register_forward_hook(add) for block in model.layers]
    model(torch.from_numpy(train_batch(dataset.train, 0, 0, 64, model.config.block_size)[0]), logits="none")
    for handle in handles:
        handle.remove()
    return moments


def roots(moment):
    """A symmetric square root of moment, and its inverse."""
    e, basis = torch.linalg.eigh(moment)
    e = e.clamp(min=1e-6 * e[-1].item()).sqrt()
    return basis * e @ basis.T, basis / e @ basis.T


def aligned(q, k, v, o, K, qk_norm):
    """Pools key/value heads after turning them towards each other, by the best partition found; their queries come along.

    A head's function leaves bases open. A RoPE plane (i, i + D/2) of keys is a complex number k(x) per token, and scores are
    the real part of conj(q) k: k may become k' = u k with any complex u if q becomes q / conj(u). So the heads of a part share,
    in each plane, the direction that holds most of their keys, each weighted by its queries (the first singular vector), and
    u_j is the phase of head j, and its norm. Values may be mapped by any matrix that the output projection takes back: the
    heads share the D directions that hold most of all o_j v_j. With qk_norm the weights of the norm stand between keys and
    RoPE, and a plane can only change its sign. Rotations per plane and for values: arXiv 2412.20677.
    """
    H, (K0, D, _) = len(q), k.shape
    r = H // K0  # queries of a head
    def planes(x):  # (heads, D, C) -> (D/2, heads, C), complex, or real with both parts in a row
        return torch.cat((x[:, :D // 2], x[:, D // 2:]), -1).transpose(0, 1) if qk_norm else torch.complex(
            x[:, :D // 2], x[:, D // 2:]).transpose(0, 1)
    keys = planes(k)
    strength = planes(q).abs().square().sum(-1).unflatten(1, (K0, r)).sum(-1).sqrt()                    # (D/2, K0)
    strong_keys = keys * strength[..., None]
    e, basis = torch.linalg.eigh(torch.einsum("jrcd,jrce->jde", *[o.unflatten(0, (K0, r))] * 2))
    strong_values = (basis * e.clamp(min=0).sqrt()[:, None]).transpose(1, 2) @ v                        # as long as o_j v_j
    key_gram = strong_keys @ strong_keys.mH                                                            # (D/2, K0, K0)
    value_gram = torch.einsum("iac,jbc->iajb", strong_values, strong_values)                            # (K0, D, K0, D)

    def kept(part):
        """The share of keys and of values that the heads of part keep."""
        n = len(part)
        spectrum = torch.linalg.eigvalsh(value_gram[part][:, :, part].reshape(n * D, n * D))
        return (torch.linalg.eigvalsh(key_gram[:, part][:, :, part])[:, -1].sum() / key_gram.diagonal(dim1=1, dim2=2).real.sum() +
                spectrum[-D:].sum() / value_gram.flatten(2).flatten(0, 1).trace()).item()

    order, new_k, new_v = [], [], []
    q, o = q.clone(), o.clone()
    for part in best_partition(K0, K, kept):
        U, S, directions = torch.linalg.svd(strong_keys[:, part], full_matrices=False)
        norms = keys[:, part].abs().square().sum(-1).sqrt()                                            # (D/2, n)
        scale = norms.square().mean(1).sqrt()
        u = torch.sgn(U[:, :, 0]) * (1.0 if qk_norm else norms / scale[:, None])
        shared = directions[:, 0] * scale[:, None]                                                     # (D/2, C)
        new_k.append(torch.cat(shared.chunk(2, -1)) if qk_norm else torch.cat((shared.real, shared.imag)))
        basis = torch.linalg.svd(strong_values[part].flatten(0, 1), full_matrices=False)[2][:D]         # (D, C), orthonormal
        size = v[part].square().mean().sqrt() * v.size(-1) ** 0.5
        new_v.append(basis * size)
        for i, j in enumerate(part):
            for h in range(j * r, (j + 1) * r):
                turned = torch.complex(q[h, :D // 2], q[h, D // 2:]) * u[:, i, None].conj()
                q[h] = torch.cat((turned.real, turned.imag))
                o[h] = o[h] @ v[j] @ basis.T / size
                order.append(h)
    return q[order], torch.stack(new_k), torch.stack(new_v), o[order]


def best_partition(K0, K, kept):
    """K lists of K0 / K heads: from neighbours on, heads change places as long as that raises the sum of kept(list)."""
    score = defaultdict(float)
    def value(part):
        part = tuple(sorted(part))
        if part not in score:
            score[part] = kept(list(part))
        return score[part]
    n, order = K0 // K, list(range(K0))
    part = lambda order, i: order[i // n * n:i // n * n + n]
    moved = n < K0
    while moved:
        moved = False
        for a in range(K0):
            for b in range((a // n + 1) * n, K0):
                other = list(order)
                other[a], other[b] = order[b], order[a]
                if value(part(other, a)) + value(part(other, b)) > value(part(order, a)) + value(part(order, b)) + 1e-6:
                    order, moved = other, True
    return [sorted(part(order, i)) for i in range(0, K0, n)]


COMMANDS = {"to_hf": (to_hf, ToHFConfig), "from_hf": (from_hf, FromHFConfig), "pool": (pool, PoolConfig)}


@program
def main(argv):
    if "--help" in argv[:1] or "-h" in argv[:1]:
        print("\n\n".join([__doc__.strip(), *(help_text(cls, name) for name, (_, cls) in COMMANDS.items())]))
        return
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"{argv[0] if argv else 'nothing'} is no conversion: begin with {', '.join(COMMANDS)}")
    command, cls = COMMANDS[argv[0]]
    command(build(cls, parse(cls, argv[1:], f"{__doc__.strip()}\n\n{argv[0]}")))


if __name__ == "__main__":
    main()
