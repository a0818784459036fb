"""What a run reports: metrics.jsonl, the terminal, wandb, and where its time goes."""
import contextlib
import errno
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from nanogqa import schema
from nanogqa.configurator import UserError, drop_output, off_default, one_line
from nanogqa.costs import kv_bytes_per_token, kv_cache_bytes, num_params
from nanogqa.distributed import world
from nanogqa.files import append, replacing, write_json

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


def warn(text):
    """Prints a warning to standard error on rank 0."""
    if master():
        print(f"warning: {text}", file=sys.stderr, flush=True)


# -- where rows and text go ------------------------------------------------------------------------

class Lasting:
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
def lasting_output():
    """While it is open, standard output and error are Lasting."""
    out, err = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        drop_output()


class Backlog:
    """Rows on their way to a file or a service. While that fails they are kept, and each new row
    tries again to write all of them."""

    def __init__(self, name, write):
        self.name = name
        self.write = write  # a function of a list of rows, which raises an exception if it fails
        self.rows = []
        self.failed = None  # why the last attempt has failed

    def add(self, row):
        self.rows.append(row)
        self.flush()

    def flush(self):
        """Tries to write the rows."""
        try:
            self.write(self.rows)
        except Exception as error:  # a full disk; wandb fails in many ways
            if self.failed is None:
                warn(f"cannot write to {self.name} ({reason(error)}): its rows are kept, and the "
                     "next row tries again")
            self.failed = reason(error)
        else:
            self.rows, self.failed = [], None


def reason(error):
    """Why an exception was raised, as a few words."""
    return getattr(error, "strerror", None) or one_line(error, 100)


class RowFile:
    """The file metrics.jsonl. It starts with the rows up to step start (-1: none), since a killed
    run may have logged later ones."""

    def __init__(self, path, start):
        self.path = path
        self.kept = [row for row in read_rows(path) if row["step"] <= start]

    def write(self, rows):
        if self.kept is not None:
            with replacing(self.path) as file:
                file.write(lines(self.kept))
            self.kept = None
        append(self.path, lines(rows))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class Log:
    """metrics.jsonl, lines on the terminal above a progress bar, wandb, and the trace of
    config.profile. Rank 0 writes; on other ranks nothing happens."""

    def __init__(self, config, start):
        """Keeps the rows up to step start."""
        self.bar = self.wandb = None
        self.backlogs = []
        self.trace = profiler(config)
        if not master():
            return
        path = Path(config.out_dir) / "metrics.jsonl"
        self.backlogs = [Backlog(path, RowFile(path, start).write)]
        if config.wandb_log:
            self.wandb = start_wandb(config)
            self.backlogs.append(Backlog("wandb", self.write_wandb))
        for backlog in self.backlogs:
            backlog.flush()
        # tqdm's disable=None: no bar where the output is not a terminal
        self.bar = tqdm(total=config.max_steps, initial=max(0, start), desc=config.out_dir,
                        unit="step", disable=None)

    def write_wandb(self, rows):
        for row in rows:
            self.wandb.log(without_none(row), step=row["step"])

    def advance(self, step):
        """The run has done that many steps: called after each one."""
        self.trace.step()
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def row(self, **row):
        """Logs one row: a dict of numbers, None where there is none at this step."""
        if self.bar is None:
            return
        row = {key: finite(value) for key, value in row.items()}
        for backlog in self.backlogs:
            backlog.add(row)
        known = without_none(row)
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

    def check_written(self):
        """Tries once more to write the rows that are kept. Raises UserError if that fails."""
        for backlog in self.backlogs:
            backlog.flush()
            if backlog.failed:
                raise UserError(
                    f"{count(len(backlog.rows), 'row')} could not be written to {backlog.name} "
                    f"({backlog.failed}): make room before the next run; the checkpoint is saved")

    def __enter__(self):
        self.trace.__enter__()
        return self

    def __exit__(self, *error):
        self.trace.__exit__(*error)
        for backlog in self.backlogs:
            if backlog.failed:
                backlog.flush()
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:  # the run is complete without it
                warn(f"wandb did not finish ({reason(error)})")


def without_none(row):
    return {key: value for key, value in row.items() if value is not None}


# -- wandb and the profiler ------------------------------------------------------------------------

def wandb_id(value):
    """An id of a run on wandb."""
    return isinstance(value, str) and re.fullmatch(r"[\w-]{1,128}", value) is not None


WANDB = {"id": wandb_id}  # wandb.json in out_dir


def start_wandb(config):
    """The wandb run of config. A resumed run continues the one whose id is in out_dir."""
    path = Path(config.out_dir) / "wandb.json"
    known = resume = None
    if config.init_from == "resume" and path.exists():
        try:
            known = schema.read_json(path, WANDB)["id"]
            resume = "allow"
        except (OSError, ValueError) as error:
            raise UserError(f"{path} does not hold the id of a wandb run ({one_line(error)}): "
                            "delete it, and wandb starts a new run") from None
    try:
        import wandb
        run = wandb.init(project=config.wandb_project, config=asdict(config), id=known,
                         dir=os.environ.get("WANDB_DIR") or config.out_dir, resume=resume,
                         name=config.wandb_run_name or config.out_dir)
    except Exception as error:  # not installed, not logged in, no network
        raise UserError(
            f"wandb does not start ({one_line(error)}): log in with wandb login, set "
            "WANDB_MODE=offline, or leave wandb_log out") from None
    try:
        write_json(path, {"id": run.id})
    except OSError as error:
        warn(f"cannot write {path} ({reason(error)}): resumed, this run would start a new one on "
             "wandb")
    return run


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
        path = Path(config.out_dir) / "trace.json"
        try:
            with replacing(path) as file:
                trace.export_chrome_trace(file.name)
                check_trace(file.name)
        except (OSError, RuntimeError) as error:
            warn(f"cannot write {path} ({reason(error)}): the run goes on without it")
    schedule = torch.profiler.schedule(wait=4, warmup=1, active=5, repeat=1)
    return torch.profiler.profile(schedule=schedule, with_stack=True, on_trace_ready=write)


def check_trace(path):
    """Raises OSError unless path ends as a trace does: the profiler ignores a full disk."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 10))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(errno.ENOSPC, "it is incomplete")


# -- what a run prints -----------------------------------------------------------------------------

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


def sampling_command(config, dataset):
    """The command that samples from the run, as text."""
    prompt = ""
    if dataset.meta.get("python"):
        prompt = "def "
    return f'now try: python sample.py --out_dir={config.out_dir} --prompt="{prompt}"'


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
