"""Tokenizers: bytes, any tiktoken encoding, or a tokenizer.json."""
import hashlib
import json
import re
import shutil
from pathlib import Path

import tiktoken

from nanogqa.configurator import UserError

EOT = "<|endoftext|>"
HF_TOKENIZER = "tokenizer.json"
# byte-level tokenizer.json files write a byte as a visible character, as GPT-2's does: itself, or one from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNICODE_OF_BYTE = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(VISIBLE)))}


def get_tokenizer(name, folder="."):
    """The tokenizer of that name: "byte", one id per byte, 0 to 255, and end-of-text as 256; a tiktoken.Encoding; or the
    tokenizer.json in folder, whose name holds its hash."""
    if name == "byte":
        return tiktoken.Encoding("byte", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={EOT: 256})
    if name == "none":
        raise UserError("this checkpoint came without a tokenizer: train it on a data set, whose tokenizer it takes over")
    if name.startswith(HF_TOKENIZER):
        tokenizer = HuggingFaceTokenizer(folder)
        if tokenizer.name != name:
            raise UserError(f"{folder}/{HF_TOKENIZER} is not the one that belongs here (another sha256): restore it from a copy")
        return tokenizer
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError:  # of which a failed download is one
        raise UserError(f"the files of tokenizer {name!r} are not on this machine and cannot be downloaded: set "
                        "TIKTOKEN_CACHE_DIR to a folder that holds them, or use --tokenizer=byte") from None
    except ValueError:
        names = ", ".join(["byte", *tiktoken.list_encoding_names()])
        raise UserError(f"there is no tokenizer {name!r}: choose one of {names}, or a folder with a {HF_TOKENIZER}") from None
    if EOT not in encoding.special_tokens_set:
        raise UserError(f"tokenizer {name!r} has no {EOT} token to end a document with: choose another")
    return encoding


class HuggingFaceTokenizer:
    """A tokenizer.json, with what this project uses of tiktoken.Encoding. tokenizer_config.json beside it names eos_token."""

    def __init__(self, folder):
        path, about = Path(folder) / HF_TOKENIZER, Path(folder) / "tokenizer_config.json"
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs tokenizers: pip install transformers safetensors") from None
        try:
            content = path.read_bytes()
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
            special = json.loads(about.read_text()) if about.exists() else {}
            names = [special.get(key) or "" for key in ("eos_token", "bos_token")]
            eos, bos = (self.tokenizer.token_to_id(x["content"] if isinstance(x, dict) else x) for x in names)
            self.byte_level = "ByteLevel" in json.dumps(json.loads(self.tokenizer.to_str())["decoder"])
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{path} cannot be read ({str(error)[:100]}): fetch it again") from None
        if eos is None:
            raise UserError(f"{about} names no eos_token that ends a document: add it")
        self.name = f"{HF_TOKENIZER} {hashlib.sha256(content).hexdigest()[:16]}"
        self.eot_token, self.bos_token = eos, eos if bos is None else bos
        self.added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.n_vocab = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.byte = {char: byte for byte, char in UNICODE_OF_BYTE.items()}

    def encode(self, text, allowed_special="all"):
        """Ids of text, with the beginning that the model expects (a BOS token, for Llama)."""
        self.tokenizer.encode_special_tokens = not allowed_special
        return self.tokenizer.encode(text).ids

    def encode_ordinary(self, text):
        return self.encode(text, allowed_special=())

    def encode_ordinary_batch(self, texts):
        """Ids of each text, on all cores, or as many as the environment's RAYON_NUM_THREADS says."""
        self.tokenizer.encode_special_tokens = True
        return [encoded.ids for encoded in self.tokenizer.encode_batch(texts)]

    def decode_single_token_bytes(self, token):
        """The bytes of one id, which may be a part of a character. KeyError where there is no such id."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if token in self.added:
            return self.added[token].encode()
        if self.byte_level:
            return bytes(self.byte[char] for char in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece: bytes by name, and spaces as lower blocks
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def copy_tokenizer(name, source, target):
    """Lets a tokenizer.json travel along: from the folder source into target."""
    for file in (HF_TOKENIZER, "tokenizer_config.json") if name.startswith(HF_TOKENIZER) else ():
        if (Path(source) / file).exists() and not (Path(target) / file).exists():
            shutil.copyfile(Path(source) / file, Path(target) / file)
