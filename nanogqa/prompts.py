"""Prompts in, texts out: what sample.py reads and prints around its tokens."""
import functools
import json
import sys
import time
from pathlib import Path

from nanogqa.configurator import UserError
from nanogqa.tokenizer import Text, encode_text


def read_text(path):
    """The text of a UTF-8 file. Lines end with \\n or \\r\\n, and with no other character."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(
            f"cannot read the prompt {path} ({error.strerror}): name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt {path} is not UTF-8 text: convert it first") from None


def read_prompts(prompt, prompts):
    """The prompts that the settings prompt and prompts of sample.py name, as a list of texts.

    prompt is a text or FILE:path. prompts, if given, is a file with a prompt on each line; in a
    .jsonl, each line is a JSON string or {"prompt": ...}.
    """
    if prompt and prompts is not None:
        raise UserError("prompt and prompts exclude each other: leave out one or the other")
    if prompts is None:
        if prompt.startswith("FILE:"):
            return [read_text(prompt.removeprefix("FILE:"))]
        return [prompt]
    lines = read_text(prompts).removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{prompts} holds no prompts: write one on each line")
    if prompts.endswith((".jsonl", ".json")):
        lines = [json_prompt(line, f"{prompts}:{i}") for i, line in enumerate(lines, 1)]
    return lines


def json_prompt(line, where):
    try:
        value = json.loads(line)
        if isinstance(value, dict):
            value = value["prompt"]
        if isinstance(value, str):
            return value
    except (ValueError, KeyError, RecursionError):
        pass
    raise UserError(f'{where} is not a JSON string or {{"prompt": "..."}}: fix the line, or name '
                    "the file .txt for plain lines")


def encode_prompts(encoding, prompts, vocab_size):
    """The ids of each prompt; end-of-text, which starts a new document, for an empty one. Raises
    UserError if the model has no such id."""
    encode = functools.partial(encoding.encode, allowed_special="all")
    ids = []
    for prompt in prompts:
        ids.append(encode_text(encode, prompt) or [encoding.eot_token])
        if max(ids[-1]) >= vocab_size:
            raise UserError(
                f"the prompt {prompt!r:.40} has the token id {max(ids[-1])}, but the model has "
                f"vocab_size={vocab_size}: leave out the special token that it stands for")
    return ids


class Output:
    """The texts of a batch on standard output: one as it grows, several once they are complete."""

    def __init__(self, prompts, num_samples, encoding, stop, jsonl):
        self.prompts = [prompt for prompt in prompts for _ in range(num_samples)]
        if stop:
            stop = stop.replace("\\n", "\n")
        self.texts = [Text(encoding, stop) for _ in self.prompts]
        self.written = ["" for _ in self.prompts]
        self.jsonl = jsonl
        self.began = time.perf_counter()
        self.count = 0  # tokens
        self.stream = len(self.prompts) == 1 and not jsonl
        if self.stream:
            print(self.prompts[0], end="", flush=True)

    def stopped(self, row):
        """Whether a text needs no more tokens."""
        return self.texts[row].done

    def add(self, rows, ids):
        """Appends a token id to each of these texts."""
        for row, token in zip(rows, ids, strict=True):
            self.count += 1
            piece = self.texts[row].add(token)
            self.written[row] += piece
            if self.stream:
                print(piece, end="", flush=True)

    def finish(self):
        """Prints what was held back, or all texts; the speed goes to standard error."""
        seconds = time.perf_counter() - self.began
        for row, text in enumerate(self.texts):
            rest = text.finish()
            self.written[row] += rest
            if self.stream:
                print(rest)
            elif self.jsonl:
                line = dict(prompt=self.prompts[row], text=self.written[row])
                print(json.dumps(line))  # in ASCII, which every terminal and reader takes
            else:
                print(self.prompts[row] + self.written[row], flush=True)
            if not self.jsonl and row + 1 < len(self.texts):
                print("-" * 80, file=sys.stderr, flush=True)
        print(f"{self.count:,} tokens in {seconds:.2f} s, reading the prompt included: "
              f"{self.count / seconds:,.1f} tokens per second", file=sys.stderr)
