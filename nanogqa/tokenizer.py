"""Tokenizers: bytes, any tiktoken encoding, or a tokenizer.json. Also token ids back to text."""
import codecs
import hashlib
import json
import re
import shutil
from pathlib import Path

import tiktoken

from nanogqa.configurator import UserError, one_line

EOT = "<|endoftext|>"
HF_TOKENIZER = "tokenizer.json"
HF_CONFIG = "tokenizer_config.json"


def unicode_of_bytes():
    """{byte: character} as in GPT-2: byte-level tokenizer.json files store bytes as visible text.

    A visible character of Latin-1 stands for itself. The other bytes get characters from 256 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {}
    for byte in visible:
        table[byte] = chr(byte)
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(visible))
    return table


UNICODE_OF_BYTE = unicode_of_bytes()


# -- tokenizers ------------------------------------------------------------------------------------

def get_tokenizer(name, folder="."):
    """The tokenizer called name.

    "byte" has one id per byte, 0 to 255, and end-of-text as 256. A tiktoken name gives that
    Encoding. "tokenizer.json HASH" gives the tokenizer.json in folder, which must have that hash.
    """
    if name == "byte":
        return byte_tokenizer()
    if name == "none":
        raise UserError(
            "this checkpoint came without a tokenizer: train it on a data set to give it one"
        )
    if name.startswith(HF_TOKENIZER):
        return file_tokenizer(name, folder)
    return tiktoken_tokenizer(name)


def byte_tokenizer():
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        "byte", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={EOT: 256}
    )


def file_tokenizer(name, folder):
    tokenizer = HuggingFaceTokenizer(folder)
    if tokenizer.name != name:
        raise UserError(
            f"{folder}/{HF_TOKENIZER} is not the expected one (another sha256): "
            "restore it from a copy"
        )
    return tokenizer


def tiktoken_tokenizer(name):
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError:  # includes failed downloads
        raise UserError(
            f"the files of tokenizer {name!r} are not on this machine and cannot be downloaded: "
            "set TIKTOKEN_CACHE_DIR to a folder that holds them, or use --tokenizer=byte"
        ) from None
    except ValueError:
        names = ", ".join(["byte", *tiktoken.list_encoding_names()])
        raise UserError(
            f"there is no tokenizer {name!r}: choose one of {names}, or a folder with a "
            f"{HF_TOKENIZER}"
        ) from None
    if EOT not in encoding.special_tokens_set:
        raise UserError(
            f"tokenizer {name!r} has no {EOT} token to end a document with: choose another"
        )
    return encoding


class HuggingFaceTokenizer:
    """A tokenizer.json with the part of tiktoken.Encoding's interface that this project uses.

    The eos_token and bos_token are read from the tokenizer_config.json beside it.
    """

    def __init__(self, folder):
        path = Path(folder) / HF_TOKENIZER
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{path} needs tokenizers: pip install transformers safetensors"
            ) from None
        try:
            content = path.read_bytes()
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
            # a file may store both, which cuts and pads texts; AutoTokenizer ignores them too
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            special = read_special_tokens(Path(folder) / HF_CONFIG)
            eos = self.tokenizer.token_to_id(special["eos_token"])
            bos = self.tokenizer.token_to_id(special["bos_token"])
            decoder = json.loads(self.tokenizer.to_str())["decoder"]
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(
                f"{path} cannot be read ({one_line(error, 100)}): download it again"
            ) from None
        if eos is None:
            raise UserError(
                f"{Path(folder) / HF_CONFIG} names no eos_token that ends a document: add it"
            )
        self.name = f"{HF_TOKENIZER} {hashlib.sha256(content).hexdigest()[:16]}"
        self.eot_token = eos
        self.bos_token = bos
        if bos is None:
            self.bos_token = eos
        self.byte_level = "ByteLevel" in json.dumps(decoder)
        self.n_vocab = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.added = self.tokenizer.get_added_tokens_decoder()  # {id: token}
        self.byte_of_unicode = {char: byte for byte, char in UNICODE_OF_BYTE.items()}

    def encode(self, text, allowed_special="all"):
        """Ids of text, with the prefix that the model expects (a BOS token, for Llama)."""
        self.tokenizer.encode_special_tokens = not allowed_special
        return self.tokenizer.encode(text).ids

    def encode_ordinary(self, text):
        """Ids of text. Special tokens in it are encoded as ordinary text."""
        return self.encode(text, allowed_special=())

    def encode_ordinary_batch(self, texts):
        """Ids of each text. Uses all cores, or RAYON_NUM_THREADS of the environment."""
        self.tokenizer.encode_special_tokens = True
        return [encoded.ids for encoded in self.tokenizer.encode_batch(texts)]

    def decode_single_token_bytes(self, token):
        """The bytes of one id, possibly a part of a character. KeyError for an unknown id."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if token in self.added:
            return self.added[token].content.encode()
        if self.byte_level:
            return bytes(self.byte_of_unicode[char] for char in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece writes a byte as <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()  # SentencePiece writes a space as U+2581


def read_special_tokens(path):
    """The eos_token and bos_token in a tokenizer_config.json; "" for one that is not there.

    The file stores a token as text or as {"content": text, ...}.
    """
    config = {}
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
    tokens = {}
    for key in ("eos_token", "bos_token"):
        token = config.get(key) or ""
        if isinstance(token, dict):
            token = token["content"]
        tokens[key] = token
    return tokens


def copy_tokenizer(name, source, target):
    """Copies a tokenizer.json and its config from folder source to target, if name is one.

    Files that target already has are kept.
    """
    if not name.startswith(HF_TOKENIZER):
        return
    for file in (HF_TOKENIZER, HF_CONFIG):
        if (Path(source) / file).exists() and not (Path(target) / file).exists():
            shutil.copyfile(Path(source) / file, Path(target) / file)


# -- ids to text -----------------------------------------------------------------------------------

def known_ids(encoding, vocab_size):
    """(vocab_size,) bool: the ids that the tokenizer can decode.

    A model's embedding table may be padded to more rows than the tokenizer has ids.
    """
    import torch  # here, because the prepare scripts run without it
    known = torch.zeros(vocab_size, dtype=torch.bool)
    for token in range(min(vocab_size, encoding.n_vocab)):
        try:
            known[token] = len(encoding.decode_single_token_bytes(token)) > 0
        except KeyError:
            continue
    return known


class Text:
    """One sample as text while it grows: whole characters, up to end-of-text or the stop string."""

    def __init__(self, encoding, stop=None):
        self.encoding = encoding
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # decoded text that may be the beginning of the stop string
        self.done = False

    def add(self, token):
        """Appends a token id. Returns the text that can be shown now."""
        if self.done:
            return ""
        if token == self.encoding.eot_token:
            return self.finish()
        self.held += self.decoder.decode(self.encoding.decode_single_token_bytes(token))
        if self.stop and self.stop in self.held:
            text = self.held[:self.held.index(self.stop)]
            self.held = ""
            self.done = True
            return text
        certain = len(self.held) - self.stop_prefix()
        text = self.held[:certain]
        self.held = self.held[certain:]
        return text

    def stop_prefix(self):
        """How many characters at the end of the held text are a beginning of the stop string."""
        if not self.stop:
            return 0
        for length in range(min(len(self.stop) - 1, len(self.held)), 0, -1):
            if self.stop.startswith(self.held[-length:]):
                return length
        return 0

    def finish(self):
        """Ends the text. Returns what was held back; later calls return ""."""
        text = self.held
        if not self.done:
            text += self.decoder.decode(b"", final=True)
        self.held = ""
        self.done = True
        return text
