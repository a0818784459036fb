"""Tokenizers: bytes, any tiktoken encoding, or a tokenizer.json. Also token ids back to text."""
import codecs
import hashlib
import json
import re
from pathlib import Path

import tiktoken

from nanogqa import schema
from nanogqa.configurator import UserError, one_line
from nanogqa.files import replacing

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
    code = 256
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(code)
            code += 1
    return table


UNICODE_OF_BYTE = unicode_of_bytes()

# what tokenizers treat differently: see check_strings
CHECKS = [
    "", "a", "the", " ", " one blank", "   three blanks", "in  the   middle", "at the end ",
    " " * 17, f"long{' ' * 100}blanks", "\n", "\n\n\n a\r\n\t b \n ", "\t\ttabs", "2026",
    "1234567 12,345.67 10**6 \u00bd \uff11\uff12\uff13", "it's DON'T they'll I'M",
    "HelloWorld HTTPServer", "\u6f22\u5b57\u304b\u306a \u30ab\u30ca \ud55c\uad6d\uc5b4\u3002",
    "\U0001f642\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f467", "na\u00efve \u00e9 e\u0301 \ufb01",
    "\u0104\u0141\u017b\u00a0\u2003\u200b\u3000.", "\u2581lower\u2581block", "<0x0A>",
    "def f(x):\n    return x**2  # a comment\n\n\nprint(f(3))\n",
]


# -- tokenizers ------------------------------------------------------------------------------------

def get_tokenizer(name, folder="."):
    """The tokenizer called name.

    "byte" has one id per byte, 0 to 255, and end-of-text as 256. A tiktoken name gives that
    Encoding. "tokenizer.json HASH" gives the tokenizer.json in folder, which must have that
    fingerprint.
    """
    if name == "byte":
        return byte_tokenizer()
    if name == "none":
        raise UserError(
            "this checkpoint came without a tokenizer, so its ids stand for no text: train it on a "
            "data set of text to give it one"
        )
    if name.startswith(HF_TOKENIZER):
        return file_tokenizer(name, folder)
    return tiktoken_tokenizer(name)


def name_today(name, folder, wanted):
    """The name of a checkpoint's tokenizer as this version gives it; wanted is that of a data set.

    Earlier versions named a tokenizer.json by the hash of the file. So unless the names are equal,
    the tokenizer.json in folder is read.
    """
    if name != wanted and name.startswith(HF_TOKENIZER):
        name = get_tokenizer(name, folder).name
    return name


def byte_tokenizer():
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        "byte", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={EOT: 256}
    )


def file_tokenizer(name, folder):
    for file in (HF_TOKENIZER, HF_CONFIG):
        if not (Path(folder) / file).exists():
            raise UserError(
                f"{folder} has no {file}: copy it from the folder of the run or data set that the "
                "checkpoint comes from"
            )
    tokenizer = HuggingFaceTokenizer(folder)
    if name not in (tokenizer.name, tokenizer.older_name):
        raise UserError(
            f"{folder}/{HF_TOKENIZER} is not the expected one (it gives other ids): "
            "restore it from a copy"
        )
    return tokenizer


def tiktoken_tokenizer(name):
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UserError(
            f"there is no tokenizer {name!r}: choose one of {', '.join(['byte', *names])}, or a "
            f"folder with a {HF_TOKENIZER}"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError):  # failed downloads; those with other content
        raise UserError(
            f"the files of tokenizer {name!r} are not on this machine and cannot be downloaded: "
            "set TIKTOKEN_CACHE_DIR to a folder that holds them, or prepare data with "
            "--tokenizer=byte"
        ) from None
    if EOT not in encoding.special_tokens_set:
        raise UserError(
            f"tokenizer {name!r} has no {EOT} token to end a document with: choose another"
        )
    return encoding


def check_strings(encoding):
    """Texts on which tokenizers are compared, also with up to 20 special tokens of encoding."""
    every = ""
    for code in [*range(1, 0x250), *range(0x370, 0x530), *range(0x4E00, 0x4E40)]:
        every += chr(code)
        if code % 7 == 0:
            every += " "
    texts = [*CHECKS, every]
    for token in sorted(encoding.special_tokens_set)[:20]:
        texts += [token, f"text{token}then {token} then", f"{token}  two blanks {token}\n"]
    return texts


class HuggingFaceTokenizer:
    """A tokenizer.json with the part of tiktoken.Encoding's interface that this project uses.

    config is the content of the tokenizer_config.json beside it, which is read unless given. It
    names the eos_token and the bos_token. Its stop_token_ids, a key of this project, lists all ids
    that end a text, the end-of-text token of documents first.
    """

    def __init__(self, folder, config=None):
        self.folder = Path(folder)
        if config is None:
            config = read_tokenizer_config(folder)
        try:
            self.load(config)
        except ImportError:
            raise UserError(
                f"{self.folder / HF_TOKENIZER} needs tokenizers: pip install transformers "
                "safetensors"
            ) from None
        except (UserError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises a bare Exception, or panics
            raise UserError(
                f"{self.folder / HF_TOKENIZER} cannot be read ({one_line(error, 100)}): download "
                "it again"
            ) from None

    def load(self, config):
        """Reads the file. Raises UserError, or any exception of tokenizers."""
        import tokenizers
        content = (self.folder / HF_TOKENIZER).read_bytes()
        self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # a file may store both, which cuts and pads texts; AutoTokenizer ignores them too
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab = self.tokenizer.get_vocab(with_added_tokens=True)  # {token: id}
        self.n_vocab = max(self.vocab.values()) + 1
        self.added = self.tokenizer.get_added_tokens_decoder()  # {id: token}
        self.byte_level = "ByteLevel" in json.dumps(json.loads(content).get("decoder"))
        self.byte_of_unicode = {char: byte for byte, char in UNICODE_OF_BYTE.items()}
        self.find_special_tokens(config)
        self.check_decoding()
        # the name that earlier versions gave it, by its file and not by what it does
        self.older_name = f"{HF_TOKENIZER} {hashlib.sha256(content).hexdigest()[:16]}"
        self.name = f"{HF_TOKENIZER} {self.fingerprint()}"

    def find_special_tokens(self, config):
        """Sets eot_token, bos_token and stop_tokens."""
        self.stop_tokens = self.known(config.get("stop_token_ids", []))
        eos = self.id_of(config.get("eos_token"))
        if not self.stop_tokens and eos is not None:
            self.stop_tokens = [eos]
        if not self.stop_tokens:
            raise UserError(
                f"{self.folder / HF_CONFIG} names no eos_token that ends a document: add it"
            )
        self.eot_token = self.stop_tokens[0]
        self.bos_token = self.id_of(config.get("bos_token"))
        if self.bos_token is None:
            self.bos_token = self.eot_token

    def id_of(self, token):
        """The id of a special token as in a tokenizer_config.json; None without one."""
        if isinstance(token, dict):
            token = token["content"]
        return self.vocab.get(token)

    def known(self, ids):
        """Those of the ids that are tokens here."""
        return [token for token in ids if self.tokenizer.id_to_token(token) is not None]

    def special_tokens(self):
        """The keys of a tokenizer_config.json that give the special tokens of this object."""
        return {
            "eos_token": self.tokenizer.id_to_token(self.eot_token),
            "bos_token": self.tokenizer.id_to_token(self.bos_token),
            "stop_token_ids": self.stop_tokens,
        }

    @property
    def special_tokens_set(self):
        """The texts of the special tokens."""
        return {token.content for token in self.added.values() if token.special}

    def check_decoding(self):
        """UserError unless the tokens of a text, decoded one by one, give what all give at once.

        They may differ by the blank that SentencePiece puts in front of a text.
        """
        for text in check_strings(self):
            ids = self.encode(text)
            together = self.tokenizer.decode(ids, skip_special_tokens=False)
            if together not in decoded(self, ids):
                kind = type(self.tokenizer.model).__name__
                raise UserError(
                    f"{self.folder / HF_TOKENIZER} is a tokenizer of kind {kind} whose text cannot "
                    "be decoded token by token: use one that is byte-level or SentencePiece, as "
                    "language models have"
                )

    def fingerprint(self):
        """16 hexadecimal digits that depend on what the tokenizer does, not on how it is written.

        They cover its vocabulary, and the ids of the check strings and of 2,000 of its tokens.
        """
        some = sorted(self.vocab.values())[::len(self.vocab) // 2000 + 1]
        encoded = []
        for text in [*check_strings(self), self.tokenizer.decode(some)]:
            encoded.append((self.encode(text), self.encode_ordinary(text)))
        content = json.dumps([sorted(self.vocab.items()), encoded])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text, allowed_special="all"):
        """Ids of text, with the prefix that the model expects (a BOS token, for Llama)."""
        self.tokenizer.encode_special_tokens = not allowed_special
        # half of a surrogate pair becomes U+FFFD, as in tiktoken
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
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


def special_token(value):
    """A special token as text, as {"content": text, ...}, or null."""
    if isinstance(value, dict):
        value = value.get("content")
        return isinstance(value, str)
    return value is None or isinstance(value, str)


def token_id(value):
    """The id of a token."""
    return schema.count(value) and value < 2**32


TOKENIZER_CONFIG = {
    "eos_token?": special_token,
    "bos_token?": special_token,
    "tiktoken?": str,  # written by convert.py: the encoding's name
    "stop_token_ids?": [token_id],
}


def read_tokenizer_config(folder):
    """The content of the tokenizer_config.json in folder; {} without one."""
    path = Path(folder) / HF_CONFIG
    try:
        return schema.read_json(path, TOKENIZER_CONFIG)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error, 100)}): download it again"
        ) from None


def stop_tokens(encoding):
    """The ids that end a text, the end-of-text token of documents first."""
    return getattr(encoding, "stop_tokens", [encoding.eot_token])


def copy_tokenizer(name, source, target, replace=False):
    """Copies a tokenizer.json and its config from folder source to target, if name names one.

    Files that target already has are kept, unless replace is True.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if not name.startswith(HF_TOKENIZER) or source == target:
        return
    for file in (HF_TOKENIZER, HF_CONFIG):
        if (source / file).exists() and (replace or not (target / file).exists()):
            with replacing(target / file, "wb") as copy:
                copy.write((source / file).read_bytes())


def encode_text(encode, text):
    """encode(text), a method of a tokenizer. Raises UserError where tiktoken gives up: its regular
    expressions do not read a million blanks in a row."""
    try:
        return encode(text)
    except BaseException as error:
        # a panic of tiktoken's Rust code is not an Exception, and its class cannot be imported
        if type(error).__name__ != "PanicException" and not isinstance(error, ValueError):
            raise
        raise UserError(f"the tokenizer cannot read a text of {len(text):,} characters "
                        f"({one_line(error, 100)}): shorten its longest run of blanks, or "
                        "prepare data with --tokenizer=byte") from None


# -- ids to text -----------------------------------------------------------------------------------

def decoded(encoding, ids):
    """The texts that ids may be decoded to: SentencePiece may drop a blank in front."""
    pieces = b"".join(encoding.decode_single_token_bytes(token) for token in ids)
    text = pieces.decode(errors="replace")
    return (text, text.removeprefix(" "))


def known_ids(encoding, vocab_size):
    """(vocab_size,) bool: the ids that the tokenizer can decode.

    A model's embedding table may be padded to more rows than the tokenizer has ids.
    """
    import torch  # here, because the prepare scripts start without it
    known = torch.zeros(vocab_size, dtype=torch.bool)
    for token in range(min(vocab_size, encoding.n_vocab)):
        try:
            known[token] = len(encoding.decode_single_token_bytes(token)) > 0
        except KeyError:
            continue
    return known


def only_allowed(logits, allowed):
    """(B, V) logits with -inf where allowed is False: (V,) bool, as known_ids gives it, or None if
    every id is allowed. Raises UserError if a logit is NaN or the largest is not finite, as then
    nothing can be drawn."""
    if not logits.amax().isfinite():
        raise UserError("the model's logits are not finite: its weights or settings are damaged, "
                        "so go back to another checkpoint")
    if allowed is None:
        return logits
    return logits.masked_fill(~allowed, float("-inf"))


class Text:
    """One sample as text while it grows: whole characters, up to a stop token or stop string."""

    def __init__(self, encoding, stop=None):
        self.encoding = encoding
        self.stop = stop
        self.stop_tokens = stop_tokens(encoding)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # decoded text that may be the beginning of the stop string
        self.done = False

    def add(self, token):
        """Appends a token id. Returns the text that can be shown now."""
        if self.done:
            return ""
        if token in self.stop_tokens:
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
