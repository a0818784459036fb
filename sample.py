"""Generates text from a checkpoint of train.py, decoding with a KV cache.

    python sample.py --out_dir=out/gqa --prompt="def " --num_samples=3 --max_new_tokens=300

Standard output has only prompts and texts; everything else goes to standard error.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from model import GPT, GPTConfig
from nanogqa import checkpoint, folder
from nanogqa.cache import KVCache
from nanogqa.configurator import build, in_range, parse, program
from nanogqa.costs import cache_length, prefill_chunk
from nanogqa.fast import prepare_for_decoding
from nanogqa.prompts import Output, encode_prompts, read_prompts
from nanogqa.runtime import check_sampling, compile_for_decoding, pick_runtime
from nanogqa.terminal import announce_sampling
from nanogqa.tokenizer import get_tokenizer, known_ids, only_allowed


@dataclass
class SampleConfig:
    # prompts and texts
    out_dir: str = "out"  # folder with the ckpt.pt of a run, or the path of a checkpoint
    prompt: str = ""  # text to continue, or FILE:path; empty: a new document
    prompts: str | None = None  # file of prompts to continue as one batch: lines, or .jsonl
    num_samples: int = 1  # texts to generate from each prompt
    max_new_tokens: int = 300  # tokens to generate in each text
    temperature: float = 0.8  # below 1 favors likely tokens, 0 takes the most likely
    top_k: int | None = 200  # draw among the k most likely tokens; None or 0: all
    top_p: float | None = None  # draw among the fewest tokens that reach probability p
    stop: str | None = None  # end a text before this string; \n is a newline
    seed: int = 1337  # of the draws: the same command gives the same text on one machine
    output: Literal["text", "jsonl"] = "text"  # jsonl: {"prompt": ..., "text": ...} for each text
    kv_cache: bool = True  # False: recompute the whole context for every token
    # where it runs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and cache
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: from 30,000 new tokens on
    fast: bool = True  # nanogqa/fast.py; False: the plain modules of model.py

    def __post_init__(self):
        in_range(self, "num_samples", low=1)
        in_range(self, "max_new_tokens temperature top_k seed", low=0)
        in_range(self, "top_p", low=0, high=1)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Samples one id per row, (B, V) logits -> (B, 1), among the top_k most likely ids and, of
    these, the fewest whose probability reaches top_p. Temperature 0 takes the most likely id."""
    if temperature < 1e-30:  # as 0: a division by such a number could overflow to infinity
        return logits.argmax(dim=-1, keepdim=True)
    temperature = min(temperature, 1e30)  # -inf marks forbidden ids; -inf / inf would be NaN
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.float().topk(k)                                # (B, k), best first
    # the largest logit becomes 0, so that large logits over a low temperature stay finite
    probs = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        dropped = probs.cumsum(dim=-1) - probs >= top_p                 # those before reach top_p
        dropped[:, 0] = False                                           # the best always stays
        probs = probs.masked_fill(dropped, 0.0)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))


def context_start(n_tokens, block_size):
    """Index of the first token in the context that predicts the token after n_tokens.

    When a text no longer fits into block_size tokens, the older half of its context is dropped and
    the rest is read again from position 0, with or without a cache. This depends on n_tokens alone,
    so a text is the same in any batch.
    """
    half = max(1, block_size // 2)
    return max(0, math.ceil((n_tokens - block_size) / half)) * half


def prefill(model, idx, cache):
    """Reads (B, T) ids into cache, in parts; returns the logits after the last id, (B, 1, V)."""
    masked = cache.padding is not None or cache.has_rings
    rows, tokens = prefill_chunk(*idx.shape, masked, cache.static)
    logits = []
    for first in range(0, len(idx), rows):
        part = cache.rows(slice(first, first + rows))
        for ids in idx[first:first + rows].split(tokens, dim=1):
            last = model(ids, cache=part, logits="last")[0]
        logits.append(last)
    cache.length += idx.size(1)  # each part has counted its own
    return torch.cat(logits)


@dataclass
class Options:
    """Options of generate."""
    temperature: float = 1.0  # these four: see sample_token
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None
    kv_cache: bool = True  # False: recompute the whole context for every token
    compiled: object = None  # the forward pass of compile_for_decoding
    stopped: object = None  # a function: rows with stopped(row) are dropped from the batch


def pick(values, index):
    return [values[i] for i in index]


class TextBatch:
    """Texts that grow together, one token each at a time."""

    def __init__(self, model, texts, max_new_tokens, options):
        self.config, self.like = model.config, model.embed.weight
        self.model, self.options = options.compiled or model, options
        self.texts = list(map(list, texts))
        self.max_length = cache_length(self.config, texts, max_new_tokens)
        self.cache = None
        self.starts = None  # of the contexts in the cache: see context_start

    def tensor(self, rows):
        return torch.tensor(rows, device=self.like.device)

    def next_logits(self):
        """Runs the model: (B, V) float32 logits of each text's next token. Fills the cache."""
        starts = [context_start(len(text), self.config.block_size) for text in self.texts]
        contexts = [text[start:] for text, start in zip(self.texts, starts, strict=True)]
        if not self.options.kv_cache:
            # a CUDA graph writes its next logits where the last ones were
            rows = [self.model(self.tensor([c]), logits="last")[0].clone() for c in contexts]
            return torch.cat(rows)[:, -1].float()
        # the longest text may have stopped, but its padding stays: the cache may be full before
        if starts == self.starts and self.cache.length < self.cache.max_length:
            last = self.tensor([text[-1:] for text in self.texts])  # the cache has all others
            logits = self.model(last, cache=self.cache, logits="last")[0]
        else:
            logits = self.read(contexts)
            self.starts = starts
        return logits[:, -1].float()

    def read(self, contexts):
        """Reads the contexts into the cache, the shorter ones padded at their start."""
        longest = max(map(len, contexts))
        padding = [longest - len(context) for context in contexts]
        idx = [[0] * n + context for n, context in zip(padding, contexts, strict=True)]
        if self.cache is None:
            self.cache = KVCache(self.config, len(idx), self.max_length, self.like,
                                 static=self.options.compiled is not None)
        self.cache.rewind(0)
        self.cache.padding = self.tensor(padding) if any(padding) else None
        return prefill(self.model, self.tensor(idx), self.cache)

    def select(self, index):
        """Keeps the texts listed in index, which may repeat some."""
        if index != list(range(len(self.texts))):
            self.texts = list(map(list, pick(self.texts, index)))
            if self.options.kv_cache:
                self.starts = pick(self.starts, index)
                self.cache.select_rows(index)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, num_samples=1, allowed=None, **options):
    """Continues num_samples copies of each of the prompts, lists of at least one id, as one batch.

    Yields (rows, ids) for each new token, up to max_new_tokens or until every text has stopped:
    ids[i] is the next token of text rows[i], where text p * num_samples + s is sample s of prompt
    p. allowed, (V,) bool, is False for ids that are never drawn. options: the fields of Options.
    """
    options = Options(**options)
    batch = TextBatch(model, prompts, max_new_tokens, options)
    copies = [p for p in range(len(prompts)) for _ in range(num_samples)]
    rows = list(range(len(copies)))

    def unfinished(index):
        return [i for i in index if not options.stopped or not options.stopped(rows[i])]

    for step in range(max_new_tokens):
        logits = batch.next_logits()                                         # (B, V)
        if step == 0:  # each prompt is read once for all its samples
            batch.select(copies)
            logits = logits[copies]
        ids = sample_token(only_allowed(logits, allowed), options.temperature, options.top_k,
                           options.top_p, options.generator)[:, 0].tolist()
        for text, token in zip(batch.texts, ids, strict=True):
            text.append(token)
        running = unfinished(range(len(rows)))  # a compiled batch may still hold finished rows
        yield pick(rows, running), pick(ids, running)
        left = unfinished(running)  # the caller has added these ids, which may end texts
        if not left:
            return
        # each number of rows needs its own graph, so a compiled batch shrinks only by halves
        if options.compiled is None or 2 * len(left) <= len(rows):
            batch.select(left)
            rows = pick(rows, left)


@program(remedy="lower num_samples, max_new_tokens or the number of prompts")
def main(argv):
    config = build(SampleConfig, parse(SampleConfig, argv, __doc__))
    prompts = read_prompts(config.prompt, config.prompts)
    runtime = pick_runtime(config.device, config.dtype, config.compile, config.max_new_tokens)
    state = checkpoint.load(config.out_dir, GPTConfig)
    encoding = get_tokenizer(state["tokenizer"], folder.path_of(config.out_dir).parent)
    gpt_config = GPTConfig(**state["config"])
    ids = encode_prompts(encoding, prompts, gpt_config.vocab_size)
    model = checkpoint.load_model(GPT, gpt_config, state).to(runtime.device, runtime.dtype).eval()
    step = state["step"]
    del state  # it holds the weights once more, and the optimizer's moments
    check_sampling(model, config, ids, runtime)
    if config.fast:
        prepare_for_decoding(model, len(prompts) * config.num_samples)
    compiled = compile_for_decoding(model, runtime) if runtime.compile else None
    announce_sampling(config, gpt_config, runtime, step, ids)
    allowed = known_ids(encoding, gpt_config.vocab_size).to(runtime.device)
    output = Output(prompts, config.num_samples, encoding, config.stop, config.output == "jsonl")
    generator = torch.Generator(runtime.device).manual_seed(config.seed)
    for rows, new in generate(
            model, ids, config.max_new_tokens, config.num_samples, allowed,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            generator=generator, kv_cache=config.kv_cache, compiled=compiled,
            stopped=output.stopped):
        output.add(rows, new)
    output.finish()


if __name__ == "__main__":
    main()
