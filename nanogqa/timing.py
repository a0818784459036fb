"""Where the time of a run goes: tokens per second, phases, and a trace of the profiler."""
import contextlib
import errno
import os
import time
from pathlib import Path

import torch

from nanogqa.distributed import first_rank
from nanogqa.files import replacing
from nanogqa.terminal import reason, warn


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
        """The time since training began, as text."""
        minutes, seconds = divmod(round(time.perf_counter() - self.began), 60)
        return f"{minutes} min {seconds} s"


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
            if self.cuda:
                seconds = before.elapsed_time(mark) / 1e3
            else:
                seconds = mark - before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.marks = self.marks[-1:]

    def __str__(self):
        self.add_up()
        whole = sum(self.seconds.values()) or 1.0
        shares = [f"{phase} {seconds:.1f} s ({seconds / whole:.0%})"
                  for phase, seconds in self.seconds.items()]
        text = ", ".join(shares)
        if self.cuda:
            peak = torch.cuda.max_memory_allocated() / 2**30
            text += f"; at most {peak:.2f} GiB of GPU memory"
        return text


class NoTrace(contextlib.nullcontext):
    """Where nothing is traced."""

    def step(self):
        pass


def profiler(config):
    """Where config.profile is set, traces 5 steps from the sixth on into out_dir/trace.json."""
    if not config.profile or not first_rank():
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
