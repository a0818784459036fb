"""What programs print: what is about to run, warnings, results."""
import contextlib
import shlex
import sys

import torch

from nanogqa.configurator import drop_output, off_default, one_line, plural
from nanogqa.costs import (
    cache_length,
    kv_bytes_beyond_windows,
    kv_bytes_per_token,
    kv_cache_bytes,
    num_params,
)
from nanogqa.distributed import first_rank


def say(text):
    """Prints on rank 0."""
    if first_rank():
        print(text, flush=True)


def warn(text):
    """Prints a warning to standard error on rank 0."""
    if first_rank():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def reason(error):
    """Why an exception was raised, as a few words."""
    return getattr(error, "strerror", None) or one_line(error, 100)


# -- terminals that are full or gone ---------------------------------------------------------------

class TolerantStream:
    """A text stream that drops what it cannot write: a full disk or a closed terminal does not end
    a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


@contextlib.contextmanager
def tolerant_output():
    """While it is open, standard output and error are TolerantStreams."""
    out, err = TolerantStream(sys.stdout), TolerantStream(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        drop_output()


# -- what is about to run, and what has come of it -------------------------------------------------

def announce(config, model, batches, runtime):
    """Prints what is about to run."""
    dataset = batches.dataset
    meta = dataset.meta
    per_step = config.tokens_per_step
    epochs = per_step * config.max_steps / dataset.train.n_tokens
    say(f"{runtime.where}, {runtime.how}; {plural(runtime.ranks, 'rank')}")
    say(f"model: {num_params(model):,} parameters ({num_params(model, embedding=False):,} "
        f"without the embedding table), {off_default(model.config, ['n_head'])}, KV cache "
        f"{cache_text(model.config, torch.float32)} in float32")
    loss_on = ""
    if dataset.answer_after is not None:
        loss_on = f"; the loss counts answers alone: tokens {dataset.train.answer_place()}"
    say(f"data: {config.dataset}, {dataset.train.n_tokens:,} training tokens, tokenizer "
        f"{meta['tokenizer']}, sha256 {meta['sha256'][:16]}{loss_on}")
    say(f"batch: {per_step:,} tokens per step = {plural(batches.batch_size, 'sequence')} x "
        f"{config.block_size} tokens x {plural(runtime.ranks, 'rank')} x "
        f"{plural(batches.micro_steps, 'micro-step')}; {plural(config.max_steps, 'step')} = "
        f"{epochs:.2f} epochs")


def cache_text(config, dtype):
    """The bytes that a token takes in the cache; fewer where layers with a window are full."""
    text = f"{kv_bytes_per_token(config, dtype):,} bytes per token"
    beyond = kv_bytes_beyond_windows(config, dtype)
    if beyond < kv_bytes_per_token(config, dtype) and config.window < config.block_size:
        text += f" ({beyond:,} beyond the window of {config.window:,})"
    return text


def announce_resume(state, settings, runtime):
    """Prints the step of the checkpoint state, and what the resumed run does differently."""
    now = settings | runtime.describe()
    before = state["settings"] | state["runtime"]
    changed = []
    for key, value in now.items():
        if before.get(key, value) != value:
            changed.append(f"{key} {before[key]} -> {value}")
    text = f"resuming at step {state['step']}"
    if changed:
        text += f", changed: {', '.join(changed)}"
    say(one_line(text, 1000))  # a checkpoint may hold any text


def next_command(config, dataset):
    """What to run next, as text: sample.py, or an evaluation where ids stand for no text."""
    if dataset.meta["tokenizer"] == "none":
        return (f"evaluate it again: python train.py --out_dir={shlex.quote(config.out_dir)} "
                "--init_from=resume --eval_only=True")
    prompt = ""
    if dataset.meta.get("python"):
        prompt = "def "
    out_dir = shlex.quote(config.out_dir)
    return f'now try: python sample.py --out_dir={out_dir} --prompt="{prompt}"'


def announce_sampling(config, gpt_config, runtime, step, ids):
    """Prints to standard error what sample.py is about to run; ids are those of each prompt."""
    longest, block_size = max(map(len, ids)), gpt_config.block_size
    cache = "no KV cache"
    if config.kv_cache:
        length = cache_length(gpt_config, ids, config.max_new_tokens)
        row = kv_cache_bytes(gpt_config, length, runtime.dtype)
        total = row * len(ids) * config.num_samples
        cache = f"KV cache {cache_text(gpt_config, runtime.dtype)}, {total:,} in all"
    print(f"{runtime.where}, {runtime.how}; {config.out_dir} at step {step}, "
          f"{off_default(gpt_config, ['n_head'])}; {cache}", file=sys.stderr)
    if longest > block_size:
        print(f"only the end of a prompt longer than block_size={block_size} is read",
              file=sys.stderr)


def result(metrics):
    """The known metrics of an evaluation, as text."""
    return ", ".join(f"{key} {value:.4f}" for key, value in without_none(metrics).items())


def without_none(row):
    """The entries of a row that have a value."""
    return {key: value for key, value in row.items() if value is not None}
