"""What a run reports: metrics.jsonl, the terminal, wandb, and where its time goes."""
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from nanogqa import schema
from nanogqa.configurator import UserError, off_default, one_line
from nanogqa.costs import kv_bytes_per_token, kv_cache_bytes, num_params
from nanogqa.distributed import world
from nanogqa.files import replacing

# how the terminal shows a number of a row, others with four digits
FORMATS = {"lr": ".2e", "grad_norm": ".2f", "tokens_per_sec": ",.0f", "mfu": ".1%"}
NOT_SHOWN = ("step", "tokens", "skipped")


def entry(value):
    """A finite number, or None where a step has none."""
    return value is None or schema.number(value)


ROW = {"step": schema.count, str: entry}  # a line of metrics.jsonl


def read_rows(path):
    """The rows of a metrics.jsonl, dicts that match ROW; [] where there is no file.

    A line that is anything else, such as the last line of a killed run, is skipped.
    """
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            schema.check(row, ROW)
        except (ValueError, RecursionError):
            continue
        rows.append(row)
    return rows


def finite(value):
    """value for JSON: NaN and inf become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def master():
    return world()[0] == 0


def say(text):
    """Prints on rank 0."""
    if master():
        print(text, flush=True)


class Log:
    """metrics.jsonl, lines on the terminal above a progress bar, and wandb. Rank 0 writes; on
    other ranks nothing happens."""

    def __init__(self, config, start):
        """Keeps the rows up to step start (-1: none): a killed run may have logged later ones."""
        self.bar = self.wandb = None
        if not master():
            return
        if config.wandb_log:
            self.wandb = start_wandb(config)
        self.path = Path(config.out_dir) / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= start]
        with replacing(self.path) as file:
            for row in kept:
                file.write(json.dumps(row) + "\n")
        # tqdm's disable=None: no bar where the output is not a terminal
        self.bar = tqdm(total=config.max_steps, initial=max(0, start), desc=config.out_dir,
                        unit="step", disable=None)

    def row(self, **row):
        """Logs one row: a dict of numbers, None where there is none at this step."""
        if self.bar is None:
            return
        row = {key: finite(value) for key, value in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        known = {key: value for key, value in row.items() if value is not None}
        if self.wandb:
            self.wandb.log(known, step=row["step"])
        self.bar.update(row["step"] - self.bar.n)
        text = f"step {row['step']:>6}"
        for key, value in known.items():
            if key not in NOT_SHOWN:
                text += f"  {key} {value:{FORMATS.get(key, '.4f')}}"
        if row["skipped"]:
            text += f"  {row['skipped']} steps skipped (gradient not finite)"
        self.print(text)

    def print(self, text):
        if self.bar is not None:
            self.bar.write(text)
            sys.stdout.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(config):
    try:
        import wandb
        return wandb.init(project=config.wandb_project, dir=config.out_dir, config=asdict(config),
                          name=config.wandb_run_name or config.out_dir)
    except Exception as error:  # not installed, not logged in, no network
        raise UserError(
            f"wandb does not start ({one_line(error)}): log in with wandb login, set "
            "WANDB_MODE=offline, or leave wandb_log out") from None


class Rate:
    """Tokens per second of training, without evaluation, logging and saving."""

    def __init__(self, tokens_per_step, step):
        self.tokens_per_step = tokens_per_step
        self.began = time.perf_counter()
        self.restart(step)

    def restart(self, step):
        """Training goes on at this step."""
        self.since = time.perf_counter()
        self.step = step

    def at(self, step):
        """Tokens per second since the last restart; None if there was no step."""
        if step == self.step:
            return None
        return (step - self.step) * self.tokens_per_step / (time.perf_counter() - self.since)

    def elapsed(self):
        """The time of the whole run as text."""
        minutes, seconds = divmod(time.perf_counter() - self.began, 60)
        return f"{minutes:.0f} min {seconds:.0f} s"


class Times:
    """Where a run's time goes: lap(phase) charges the time since the last lap to phase.

    On CUDA it records events, which do not wait for the device.
    """

    def __init__(self, runtime):
        self.cuda = runtime.device.type == "cuda"
        self.seconds = {}
        self.marks = []
        self.lap("")

    def lap(self, phase):
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((phase, mark))
        if len(self.marks) > 1000:
            self.add_up()

    def add_up(self):
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (phase, mark) in zip(self.marks, self.marks[1:], strict=False):
            seconds = before.elapsed_time(mark) / 1e3 if self.cuda else mark - before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.marks = self.marks[-1:]

    def __str__(self):
        self.add_up()
        whole = sum(self.seconds.values()) or 1.0
        shares = [f"{phase} {seconds:.1f} s ({seconds / whole:.0%})"
                  for phase, seconds in self.seconds.items()]
        return ", ".join(shares)


class NoTrace(contextlib.nullcontext):
    """Where nothing is traced."""

    def step(self):
        pass

    def __enter__(self):
        return self


def profiler(config):
    """Where config.profile is set, traces 5 steps from the sixth on into out_dir/trace.json."""
    if not config.profile or not master():
        return NoTrace()

    def write(trace):
        trace.export_chrome_trace(f"{config.out_dir}/trace.json")
    schedule = torch.profiler.schedule(wait=4, warmup=1, active=5, repeat=1)
    return torch.profiler.profile(schedule=schedule, with_stack=True, on_trace_ready=write)


def count(n, noun):
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def announce(config, model, batches, runtime):
    """Prints what is about to run."""
    dataset = batches.dataset
    meta = dataset.meta
    per_step = config.tokens_per_step
    epochs = per_step * config.max_steps / dataset.train.n_tokens
    say(f"{runtime.why}; {count(runtime.ranks, 'rank')}")
    say(f"model: {num_params(model):,} parameters ({num_params(model, embedding=False):,} "
        f"without the embedding table), {off_default(model.config, ['n_head'])}, KV cache "
        f"{kv_bytes_per_token(model.config):,} bytes per token in float32")
    say(f"data: {config.dataset}, {dataset.train.n_tokens:,} training tokens, tokenizer "
        f"{meta['tokenizer']}, sha256 {meta['sha256'][:16]}")
    say(f"batch: {per_step:,} tokens per step = {count(batches.batch_size, 'sequence')} x "
        f"{config.block_size} tokens x {count(runtime.ranks, 'rank')} x "
        f"{count(batches.micro_steps, 'micro-step')}; {count(config.max_steps, 'step')} = "
        f"{epochs:.2f} epochs")


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
    say(text)


def announce_sampling(config, gpt_config, runtime, step, ids):
    """Prints to standard error what sample.py is about to run; ids are those of each prompt."""
    longest, block_size = max(map(len, ids)), gpt_config.block_size
    cache = "no KV cache"
    if config.kv_cache:
        per_token = kv_bytes_per_token(gpt_config, runtime.dtype)
        length = min(block_size, longest + config.max_new_tokens)
        row = kv_cache_bytes(gpt_config, length, runtime.dtype)
        total = row * len(ids) * config.num_samples
        cache = f"KV cache {per_token:,} bytes per token, {total:,} in all"
    print(f"{runtime.why}; {config.out_dir} at step {step}, "
          f"{off_default(gpt_config, ['n_head'])}; {cache}", file=sys.stderr)
    if longest > block_size:
        print(f"only the end of a prompt longer than block_size={block_size} is read",
              file=sys.stderr)


def result(metrics):
    """The metrics of an evaluation as text."""
    return ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
