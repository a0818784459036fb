"""Tokenizers and Hugging Face's folders: written so that transformers reads our ids, and compared.

convert.py uses it. It needs the optional packages transformers and safetensors.
"""
import importlib
import os
import re
import shutil
from pathlib import Path

import tiktoken

from nanogqa import schema
from nanogqa.configurator import UserError, one_line
from nanogqa.files import write_json
from nanogqa.tokenizer import (
    EOT,
    HF_CONFIG,
    HF_TOKENIZER,
    UNICODE_OF_BYTE,
    HuggingFaceTokenizer,
    check_strings,
    decoded,
    get_tokenizer,
    read_tokenizer_config,
    token_id,
)

# Keys of a tokenizer_config.json that an export keeps. The others can make transformers change what
# the tokenizer.json says, such as add_prefix_space or add_bos_token.
KEPT = (
    "eos_token", "bos_token", "pad_token", "unk_token", "chat_template", "padding_side",
    "tiktoken", "stop_token_ids",
)
CLASS = "PreTrainedTokenizerFast"  # which follows the tokenizer.json
# transformers 5 replaces the class that a tokenizer_config.json names for a model_type in its list
# MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS, unless an auto_map names one too. Without
# trust_remote_code both versions then use CLASS, with it the class in MODULE.
FORCED = ("qwen2",)
MODULE = "tokenization"
PROGRAM = f"""from transformers import {CLASS} as FollowsTokenizerJson


class {CLASS}(FollowsTokenizerJson):
    pass
"""


# -- optional packages -----------------------------------------------------------------------------

def import_extra(name):
    """A module of the optional packages. Raises UserError if it is not installed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns about forks
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: pip install transformers safetensors") from None


def import_transformers():
    """transformers without its progress bars and warnings."""
    transformers = import_extra("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


# -- to Hugging Face -------------------------------------------------------------------------------

def write_tokenizer(encoding, source, folder, model_type, block_size):
    """Writes a tokenizer as the tokenizer.json and tokenizer_config.json of a Hugging Face folder,
    for a model of that type and context.

    source is the folder that a HuggingFaceTokenizer is copied from. Raises UserError if
    transformers reads other ids from the result.
    """
    about = {"model_max_length": block_size}
    if isinstance(encoding, tiktoken.Encoding):
        save(hf_tokenizer(encoding), folder / HF_TOKENIZER)
        about |= {"tiktoken": encoding.name}  # lets from_hf recognize it
        about |= {"eos_token": EOT, "bos_token": EOT, "pad_token": EOT}
    else:
        shutil.copyfile(Path(source) / HF_TOKENIZER, folder / HF_TOKENIZER)
        for key, value in read_tokenizer_config(source).items():
            if key in KEPT:
                about[key] = value
    about |= {"tokenizer_class": CLASS, "clean_up_tokenization_spaces": False}
    if model_type in FORCED:
        about["auto_map"] = {"AutoTokenizer": [None, f"{MODULE}.{CLASS}"]}
        (folder / f"{MODULE}.py").write_text(PROGRAM, encoding="utf-8")
    write_json(folder / HF_CONFIG, about)
    check_export(encoding, folder)


def save(tokenizer, path):
    """Writes a tokenizers.Tokenizer. OSError if that fails: tokenizers raises a bare Exception."""
    try:
        tokenizer.save(str(path))
    except Exception as error:
        raise OSError(0, one_line(error, 100)) from None


def hf_tokenizer(encoding):
    """The tokenizers.Tokenizer that gives the ids of a tiktoken.Encoding.

    tiktoken merges the neighbors whose union has the lowest id. tokenizers merges by a list of
    pairs, first pair first. So the list has each split of each token in two, in the order of ids.
    """
    tokenizers = import_extra("tokenizers")
    ranks = encoding._mergeable_ranks                        # {bytes: id}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((visible(token[:i]), visible(token[i:])))
    model = tokenizers.models.BPE(vocab=hf_vocab(encoding), merges=merges, ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(model)

    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [to_bytes]
    if merges:
        # "{1,3}+" is possessive for tiktoken, but a repeated group for tokenizers. Without the +,
        # tokenizers matches what tiktoken does
        pattern = tokenizers.Regex(re.sub(r"(\{\d+,\d+\})\+", r"\1", encoding._pat_str))
        steps = [tokenizers.pre_tokenizers.Split(pattern, behavior="isolated"), to_bytes]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()

    special = []
    for name in sorted(encoding._special_tokens, key=encoding._special_tokens.get):
        special.append(tokenizers.AddedToken(name, normalized=False, special=True))
    tokenizer.add_special_tokens(special)
    return tokenizer


def hf_vocab(encoding):
    """{token as text: id} of a tiktoken.Encoding, as a byte-level tokenizer.json has it."""
    vocab = {}
    for token, i in encoding._mergeable_ranks.items():
        vocab[visible(token)] = i
    return vocab | encoding._special_tokens


def visible(token):
    """A token's bytes as the characters that a byte-level tokenizer.json uses for them."""
    return "".join(UNICODE_OF_BYTE[byte] for byte in token)


def check_export(encoding, folder):
    """Raises UserError unless transformers gives the ids and the text of encoding."""
    transformers = import_transformers()
    text = first_difference(encoding, folder, decode=True)
    if text is not None:
        raise UserError(
            f"transformers {transformers.__version__} reads the text {text!r:.60} of tokenizer "
            f"{encoding.name!r} differently from this program: use another version of "
            "transformers, or another tokenizer"
        )


# -- the tokenizer that transformers makes of a folder ---------------------------------------------

def first_difference(encoding, folder, decode=False):
    """The first check string for which AutoTokenizer gives other ids than encoding, or None.

    With decode, also the first whose ids it decodes to another text. Raises UserError if it cannot
    load the tokenizer in folder.
    """
    transformers = import_transformers()
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        for text in compared_texts(encoding):
            ids = encoding.encode(text, allowed_special="all")
            if theirs(text)["input_ids"] != ids:
                return text
            if decode and theirs.decode(ids) not in decoded(encoding, ids):
                return text
    except Exception as error:  # transformers raises many kinds of errors for a bad folder
        raise UserError(
            f"transformers {transformers.__version__} cannot use the tokenizer "
            f"({one_line(error)}): use another version of transformers, or another tokenizer"
        ) from None
    return None


def compared_texts(encoding):
    """The texts on which the tokenizer of a folder is compared with encoding: this file is one."""
    return [*check_strings(encoding), Path(__file__).read_text(encoding="utf-8")]


# -- from Hugging Face -----------------------------------------------------------------------------

def read_json(path, content):
    """The content of a JSON file of a Hugging Face folder, as the schema content asks for."""
    try:
        return schema.read_json(path, content)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): name a Hugging Face folder with --hf_dir"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is not a JSON object as Hugging Face writes it ({one_line(error, 100)}): "
            "download it again"
        ) from None


def token_id_or_list(value):
    """A token id, a list of them, or null."""
    if isinstance(value, list):
        return all(token_id(element) for element in value)
    return value is None or token_id(value)


SPECIAL_IDS = {"eos_token_id?": token_id_or_list, "bos_token_id?": token_id_or_list}


def ids_of(contents, key):
    """The token ids that several JSON objects have as key, as one list, the first ones first."""
    found = []
    for content in contents:
        value = content.get(key)
        if not isinstance(value, list):
            value = [value]
        for token in value:
            if token is not None and token not in found:
                found.append(token)
    return found


def read_tokenizer(hf_dir, hf, folder):
    """The tokenizer in hf_dir: a HuggingFaceTokenizer, or the tiktoken.Encoding that to_hf wrote.

    hf is the content of config.json, whose ids the model was trained with. Those that
    generation_config.json adds end a text too. Unless tiktoken provides the tokenizer, its files
    are copied to folder.
    """
    generation = {}
    if (hf_dir / "generation_config.json").exists():
        generation = read_json(hf_dir / "generation_config.json", SPECIAL_IDS)
    about = read_tokenizer_config(hf_dir)
    template = hf_dir / "chat_template.jinja"  # transformers 5 writes it there, and reads it first
    if template.exists():
        about["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
    stop = {"stop_token_ids": ids_of((hf, generation), "eos_token_id")}
    theirs = HuggingFaceTokenizer(hf_dir, about | stop)
    for token in theirs.known(ids_of((hf,), "bos_token_id")):
        theirs.bos_token = token
    name = about.get("tiktoken")
    if name is not None and is_tiktoken(name, theirs):
        return get_tokenizer(name)
    shutil.copyfile(hf_dir / HF_TOKENIZER, folder / HF_TOKENIZER)
    write_json(folder / HF_CONFIG, about | theirs.special_tokens())
    return theirs


def is_tiktoken(name, theirs):
    """Whether a HuggingFaceTokenizer does what to_hf writes for the tiktoken encoding name.

    Its file may have been saved again: transformers adds a post-processor that does nothing.
    """
    try:
        encoding = get_tokenizer(name)
    except UserError:
        return False  # the files of tiktoken are not on this machine
    if not isinstance(encoding, tiktoken.Encoding) or theirs.vocab != hf_vocab(encoding):
        return False
    if theirs.stop_tokens != [encoding.eot_token]:
        return False
    for text in compared_texts(encoding):
        if theirs.encode(text) != encoding.encode(text, allowed_special="all"):
            return False
    return True


def compare_import(encoding, hf_dir):
    """None if AutoTokenizer gives the ids of encoding, the tokenizer in hf_dir; else a warning.

    Its classes replace parts of a tokenizer.json by their own, which depend on the version.
    """
    version = import_transformers().__version__
    try:
        text = first_difference(encoding, hf_dir)
    except UserError as error:
        return f"the tokenizer was not compared: {error}"
    if text is None:
        return None
    return (
        f"AutoTokenizer of transformers {version} gives other ids than {hf_dir / HF_TOKENIZER} for "
        f"{text!r:.60}: this program and its exports follow {HF_TOKENIZER}"
    )
