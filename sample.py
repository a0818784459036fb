"""Generates text from a checkpoint of train.py, decoding with a KV cache.

    python sample.py --out_dir=out/gqa --prompt="def " --num_samples=3 --max_new_tokens=300 --temperature=0.8 --top_k=200

Standard output carries the prompt and the text alone, everything else goes to standard error.
"""
import codecs
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nanogqa import checkpoint
from nanogqa.configurator import UserError, build, parse, program
from model import GPT, GPTConfig, KVCache
from nanogqa.costs import kv_bytes_per_token, prefill_chunk
from nanogqa.fast import prepare_for_decoding
from nanogqa.runtime import compile_for_decoding, pick_runtime
from nanogqa.tokenizer import Text, get_tokenizer, known_ids


@dataclass
class SampleConfig:
    out_dir: str = "out"          # folder with the ckpt.pt of a run
    prompt: str = ""              # text to continue, or FILE:path; empty: a new document; <|endoftext|> is understood
    prompts: str | None = None    # a file of prompts to continue as one batch: one a line, JSON lines if named .jsonl
    num_samples: int = 1          # texts to generate from each prompt
    max_new_tokens: int = 300     # tokens to generate in each
    temperature: float = 0.8      # below 1 prefers the likely, above 1 flattens; 0 always takes the likeliest
    top_k: int | None = 200       # draw among the k likeliest tokens; None or 0: among all
    top_p: float | None = None    # draw among the fewest tokens whose probability reaches p; None or 1: among all
    stop: str | None = None       # end a text before this string; \n means a newline. end-of-text always ends it
    seed: int = 1337              # of the draws: the same seed, the same text
    output: Literal["text", "jsonl"] = "text"  # jsonl: {"prompt": ..., "text": ...}, a line for each text
    kv_cache: bool = True         # False recomputes the whole context for every token
    device: str = "auto"          # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and cache. auto: bfloat16 on CUDA
    compile: Literal["auto", True, False] = "auto"  # torch.compile. auto: where max_new_tokens are enough to pay for it

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed"):
            value, least = getattr(self, name), int(name == "num_samples")
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"top_p is a probability, at most 1, not {self.top_p}")


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, V) logits -> (B, 1) token ids, drawn among the top_k likeliest and, of these, the fewest that reach top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.float().topk(k)                                # (B, k), likeliest first; exactly k on ties
    probs = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)    # from 0 down, so that no temperature overflows
    if top_p is not None and top_p < 1:
        enough = probs.cumsum(dim=-1) - probs >= top_p                  # those before it already reach top_p
        enough[:, 0] = False                                            # the likeliest always stays
        probs = probs.masked_fill(enough, 0.0)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))


def context_start(n_tokens, block_size):
    """The first of n_tokens that the next one is predicted from: all are, up to block_size.

    When the context is full its older half is dropped and the rest read again, from position 0. A function of the
    count alone, so that decoding with and without a cache, and from any prompt length, sees the same context.
    """
    half = max(1, block_size // 2)
    return max(0, -(-(n_tokens - block_size) // half)) * half


def prefill(model, idx, cache, chunk):
    """Reads (B, T) ids into cache, chunk tokens of each row at a time; returns the logits behind the last, (B, 1, V)."""
    for part in idx.split(chunk, dim=1):
        logits = model(part, cache=cache, logits="last")[0]
    return logits


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, num_samples=1, known=None, kv_cache=True, stopped=lambda row: False, compiled=None,
             **sampling):
    """Continues num_samples copies of each of the prompts, lists of at least one id, as one batch.

    Yields (rows, ids) max_new_tokens times: ids[i] is the next token of text rows[i], where text p * num_samples + s is
    sample s of prompt p. A row of which stopped(row) is true costs nothing from then on (compiled: rows leave when half
    of them have stopped, since another number of rows is another graph). model maps (idx, cache=, logits=) as
    GPT.forward; known (V,) bool forbids the ids that are False; compiled is compile_for_decoding's; sampling goes to
    sample_token.
    """
    config, weight = model.config, model.embed.weight
    device, forward = weight.device, compiled or model
    texts, rows = [list(prompt) for prompt in prompts], None
    max_length = min(config.block_size, max(map(len, texts)) + max_new_tokens)
    cache, cache_starts = None, None
    for _ in range(max_new_tokens):
        starts = [context_start(len(text), config.block_size) for text in texts]
        if not kv_cache:
            logits = torch.cat([forward(torch.tensor([text[start:]], device=device), logits="last")[0]
                                for text, start in zip(texts, starts)])
        elif starts == cache_starts and cache.length < cache.max_length:  # the cache has all but the last token
            logits = forward(torch.tensor([text[-1:] for text in texts], device=device), cache=cache, logits="last")[0]
        else:
            contexts = [text[start:] for text, start in zip(texts, starts)]
            longest = max(map(len, contexts))
            padding = [longest - len(context) for context in contexts]
            idx = torch.tensor([[0] * n + context for n, context in zip(padding, contexts)], device=device)
            if cache is None:
                cache = KVCache(config, len(texts), max_length, device, weight.dtype, static=compiled is not None)
            cache.rewind(0)
            cache.padding = torch.tensor(padding, device=device) if any(padding) else None
            logits, cache_starts = prefill(forward, idx, cache, prefill_chunk(config, len(texts))), starts
        logits = logits[:, -1].float()                                  # (B, V)
        if rows is None:                                                # each prompt is read once for all its samples
            copies = [p for p in range(len(prompts)) for _ in range(num_samples)]
            texts, rows, cache_starts = [list(texts[p]) for p in copies], list(range(len(copies))), [starts[p] for p in copies]
            logits, cache = logits[copies], cache.rows(copies) if kv_cache and num_samples > 1 else cache
        if known is not None:
            logits = logits.masked_fill(~known, -torch.inf)
        ids = sample_token(logits, **sampling)[:, 0].tolist()
        for text, token in zip(texts, ids):
            text.append(token)
        going = [i for i, row in enumerate(rows) if not stopped(row)]
        yield [rows[i] for i in going], [ids[i] for i in going]
        going = [i for i in going if not stopped(rows[i])]
        if not going:
            return
        if len(going) < len(rows) and (compiled is None or 2 * len(going) <= len(rows)):
            texts, rows, cache_starts = ([x[i] for i in going] for x in (texts, rows, cache_starts))
            cache = cache.rows(going) if kv_cache else None


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the prompt {path} ({error.strerror}): name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt {path} is not UTF-8 text: convert it first") from None


def read_prompts(config):
    """The prompts that the settings name: of a file of prompts, one a line, as text or as JSON strings or {"prompt": ...}."""
    if config.prompts is None:
        return [read_text(config.prompt[5:]) if config.prompt.startswith("FILE:") else config.prompt]
    prompts = []
    for number, line in enumerate(read_text(config.prompts).splitlines(), 1):
        if config.prompts.endswith((".jsonl", ".json")):
            try:
                line = json.loads(line)
                line = line["prompt"] if isinstance(line, dict) else line
                if not isinstance(line, str):
                    raise ValueError
            except (ValueError, KeyError, RecursionError):
                raise UserError(f'{config.prompts}:{number} is no JSON string and no {{"prompt": "..."}}: mend the line, or '
                                "name the file .txt for plain lines") from None
        prompts.append(line)
    if not prompts:
        raise UserError(f"{config.prompts} holds no prompts: write one a line")
    return prompts


@program
def main(argv):
    config = build(SampleConfig, parse(SampleConfig, argv, __doc__))
    prompts = read_prompts(config)
    runtime = pick_runtime(config.device, config.dtype, config.compile, config.max_new_tokens)
    state = checkpoint.load(config.out_dir, GPTConfig)
    encoding = get_tokenizer(state["tokenizer"], checkpoint.find(config.out_dir).parent)
    model = checkpoint.load_model(GPT, GPTConfig(**state["config"]), state).to(runtime.device, runtime.dtype).eval()
    kv_bytes, n_texts = model.kv_bytes_per_token(runtime.dtype), len(prompts) * config.num_samples
    model = prepare_for_decoding(model, n_texts)
    ids = [encoding.encode(prompt, allowed_special="all") or [encoding.eot_token] for prompt in prompts]
    length = min(model.config.block_size, max(map(len, ids)) + config.max_new_tokens)
    cache = "no KV cache"
    if config.kv_cache:
        cache = f"KV cache {kv_bytes:,} bytes per token, {kv_bytes * length * n_texts:,} in all"
    print(f"{runtime.why}; {config.out_dir} at step {state['step']}, {model.config.heads}; "
          f"attention {attention_route(model.config, runtime.device, runtime.dtype)}; {cache}",
          file=sys.stderr)

    if max(map(len, ids)) > model.config.block_size:
        print(f"of a prompt longer than block_size={model.config.block_size} only the end is read, see context_start",
              file=sys.stderr)
    stop = config.stop.replace("\\n", "\n") if config.stop else None
    texts = [Text(encoding, stop) for _ in range(n_texts)]
    written = [""] * n_texts
    stream = n_texts == 1 and config.output == "text"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still gets its text
    if stream:
        print(prompts[0], end="", flush=True)
    began, count = time.perf_counter(), 0
    tokens = generate(model, ids, config.max_new_tokens, config.num_samples,
                      known_ids(encoding, model.config.vocab_size).to(runtime.device), config.kv_cache,
                      lambda row: texts[row].done, compile_for_decoding(model, runtime) if runtime.compile else None,
                      temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                      generator=torch.Generator(runtime.device).manual_seed(config.seed))
    for rows, new in tokens:
        count += len(rows)
        for row, token in zip(rows, new):
            piece = texts[row].add(token)
            written[row] += piece
            if stream:
                print(piece, end="", flush=True)
    seconds = time.perf_counter() - began
    for row, text in enumerate(texts):
        rest = "" if text.done else text.finish()
        prompt = prompts[row // config.num_samples]
        if config.output == "jsonl":
            print(json.dumps(dict(prompt=prompt, text=written[row] + rest), ensure_ascii=False))
        else:
            print(rest if stream else prompt + written[row] + rest)
            if row + 1 < len(texts):
                print("-" * 80, file=sys.stderr, flush=True)
    print(f"{count:,} tokens in {seconds:.2f} s, reading the prompt included: {count / seconds:,.1f} tokens per second",
          file=sys.stderr)


if __name__ == "__main__":
    main()
