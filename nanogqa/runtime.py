"""Where a program runs: device, dtype, torch.compile and memory."""
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nanogqa.configurator import UserError, one_line, out_of_memory
from nanogqa.costs import (
    Decoding,
    cache_length,
    count_params,
    decoding_floor,
    num_params,
    training_floor,
)
from nanogqa.distributed import world
from nanogqa.terminal import warn

# Decoding steps from which compiling pays off: 12 layers of width 768 took 86 s to compile on two
# CPU cores, and then 16 ms a step instead of 20. Smaller models gain less and take as long for each
# layer. On CUDA: not measured.
DECODING_PAYS = 30_000


@dataclass
class Runtime:
    """The resolved settings device, dtype and compile, and the place of this rank among others."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    where: str  # device and dtype, and why, for printing
    how: str  # compiled or eager, and why, for printing
    rank: int = 0
    ranks: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def tensor(self, array):
        """A numpy array as a tensor on the device. A GPU copies it when it gets there."""
        x = torch.from_numpy(array)
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def describe(self):
        """The resolved values as plain ones, for a checkpoint."""
        dtype = str(self.dtype).removeprefix("torch.")
        return dict(device=self.device.type, dtype=dtype, compile=self.compile, ranks=self.ranks)


def pick_runtime(device, dtype, compile, decoding_steps=None):
    """The Runtime of the settings device, dtype and compile, each of which may be "auto".

    decoding_steps is the number of tokens to generate, None for training. Raises UserError if the
    device does not exist here.
    """
    rank, ranks, local_rank = world()
    device, why_device = pick_device(device, ranks, local_rank)
    if device.type == "cuda":
        # Where it is preferred (Hopper), cuDNN's attention builds a plan for every new number of
        # keys, and a cache grows with every token. Training has one number of keys.
        torch.backends.cuda.enable_cudnn_sdp(decoding_steps is None)
    dtype, why_dtype = pick_dtype(dtype, device)
    compile, why_compile = pick_compile(compile, device, decoding_steps)
    return Runtime(device, dtype, compile, f"{why_device}, {why_dtype}", why_compile, rank, ranks)


def available():
    """{kind of device: whether there is one here}, the fastest first."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}


def kind_of(device):
    """The kind of device that the setting device stands for: cuda, mps or cpu."""
    if device == "auto":
        here = available()
        return [kind for kind in here if here[kind]][0]
    return device.partition(":")[0]


def pick_device(device, ranks, local_rank):
    """(torch.device, why as text) of the setting device."""
    here = available()
    why = f"device {device}"
    if device == "auto":
        device = kind_of(device)
        why = f"device {device} (found)"
        if device == "cpu":
            why = "device cpu (no GPU found)"
    kind, colon, index = device.partition(":")
    numbered = kind == "cuda" and index.isdecimal() and len(index) < 4
    if kind not in here or (colon and not numbered):
        raise UserError(f"unknown device {device!r}: choose auto, cpu, cuda, cuda:N or mps")
    if not here[kind]:
        raise UserError(
            f"device {device!r} is not available here: choose --device=auto or --device=cpu")
    if kind == "mps" and ranks > 1:
        raise UserError("several ranks cannot share tensors of an Apple GPU: start without "
                        "torchrun, or choose --device=cpu")
    if kind == "cuda":
        if ranks > 1 and index:
            raise UserError(f"device={device} names one GPU for all {ranks} ranks: choose "
                            "--device=cuda, which gives each rank its own")
        index = int(index or local_rank)
        if index >= torch.cuda.device_count():
            raise UserError(
                f"there is no GPU {index}, this machine has {torch.cuda.device_count()}: choose "
                "another, such as --device=cpu, or start at most as many ranks as GPUs")
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    return torch.device(device), why


def pick_dtype(dtype, device):
    """(torch.dtype, why as text) of the setting dtype."""
    if dtype != "auto":
        return getattr(torch, dtype), dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bfloat16 (supported by this GPU)"
    return torch.float32, "float32 (auto chooses bfloat16 on GPUs that support it)"


def pick_compile(compile, device, decoding_steps):
    """(bool, why as text) of the setting compile."""
    why = {True: "compiled", False: "eager"}
    if compile != "auto":
        return compile, why[compile]
    if decoding_steps is None:
        compile = device.type == "cuda"
        why[False] += f" (on {device.type}, a short run ends before compiling pays off)"
    else:
        compile = decoding_steps >= DECODING_PAYS
        why[True] += f" (it pays off for {decoding_steps:,} steps)"
        why[False] += f" (compiling pays off from {DECODING_PAYS:,} steps on)"
    return compile, why[compile]


def compile_model(model, runtime, example):
    """model compiled, once example(compiled) has run; or, with one warning, model itself."""
    if not runtime.compile:
        return model
    torch.compiler.reset()  # torch.compile keeps 8 versions of a function, for all models together
    compiled = torch.compile(model)
    try:
        example(compiled)
        return compiled
    except Exception as error:  # no compiler, no Triton, an unsupported Python: many kinds
        if out_of_memory(error):
            raise
        warn_eager(error, runtime)
        return model


def compile_for_decoding(model, runtime):
    """GPT.forward in two graphs, for a static KVCache: one for a single new token, which CUDA
    graphs replay, and one for any other number of tokens.

    Each is compiled at its first call. If that fails: one warning, and from then on model itself.
    """
    mode = "reduce-overhead" if runtime.device.type == "cuda" else None
    torch.compiler.reset()  # as in compile_model
    one = torch.compile(model, mode=mode)
    many = torch.compile(model, dynamic=True)

    def forward(idx, cache=None, **kwargs):
        if runtime.compile:
            compiled = one if idx.size(1) == 1 else many
            if cache is not None:
                keep_addresses(cache)
            try:
                return compiled(idx, cache=cache, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:  # before anything has run
                warn_eager(error, runtime)
        return model(idx, cache=cache, **kwargs)
    return forward


def keep_addresses(cache):
    """Tells torch.compile that the tensors of a static cache stay where they are: CUDA graphs
    refuse inputs that move."""
    for tensors in [*cache.layers, [cache.length]]:
        for x in tensors:
            torch._dynamo.mark_static_address(x, guard=False)


def warn_eager(error, runtime):
    """Warns that compiling has failed and why; goes on in eager mode."""
    warn(f"torch.compile does not work here ({one_line(error)}): going on in eager mode")
    runtime.compile = False
    runtime.how = "eager (torch.compile failed)"


# -- the machine -----------------------------------------------------------------------------------

def describe_machine(runtime, ranks):
    """Where this runs, with that many ranks in each training run."""
    gpu = None
    cache_bytes = cpu_cache_bytes()
    if runtime.device.type == "cuda":
        gpu = torch.cuda.get_device_name(runtime.device)
        cache_bytes = torch.cuda.get_device_properties(runtime.device).L2_cache_size
    machine = dict(
        cpu=cpu_name(), threads=torch.get_num_threads(), gpu=gpu, gpus=torch.cuda.device_count(),
        cache_bytes=cache_bytes, torch=torch.__version__, python=platform.python_version(),
        system=platform.system(), **runtime.describe())
    machine["ranks"] = ranks
    return machine


def cpu_name():
    for line in lines_of("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_cache_bytes():
    """The size of the processor's largest cache; None where Linux does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = re.match(r"(\d+)K", path.read_text(encoding="utf-8"))
        if size:
            sizes.append(int(size[1]) * 1024)
    return max(sizes, default=None)


# -- memory ----------------------------------------------------------------------------------------

TEXT = 200  # bytes of an empty text of sample.py


def machine_memory():
    """Bytes that a process can hold here at most: the memory of the machine or of a smaller cgroup,
    and swap. Elsewhere than on Linux twice the memory, as macOS compresses it and grows its swap.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sys.platform != "linux":
        return 2 * memory
    limits = [int(text) for text in cgroup_limits() if text.isdecimal()]  # others are "max"
    return min([memory, *limits]) + swap_bytes()


def cgroup_limits():
    """The limits of this process's control groups and of their parents, as text."""
    for group in lines_of("/proc/self/cgroup"):
        kinds, path = group.split(":", 2)[1:]
        limit = Path("/sys/fs/cgroup", path.lstrip("/"), "memory.max")  # version 2
        if "memory" in kinds.split(","):  # version 1
            limit = Path("/sys/fs/cgroup/memory", path.lstrip("/"), "memory.limit_in_bytes")
        for folder in limit.parents:  # of this group, and of those above it
            yield from lines_of(folder / limit.name)


def swap_bytes():
    for line in lines_of("/proc/meminfo"):
        if line.startswith("SwapTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def lines_of(path):
    """The lines of a file of the kernel; [] where there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def check_memory(floor):
    """Raises UserError if the machine has less memory than floor asks for, a dict {settings to
    lower: bytes}: a lower bound of what is needed at the same time."""
    needed, memory = sum(floor.values()), machine_memory()
    if needed > memory:
        largest = max(floor, key=floor.get)
        raise UserError(f"this needs at least {gigabytes(needed)} of memory, and the machine has "
                        f"{gigabytes(memory)}: lower {largest}")


def gigabytes(n):
    return f"{n / 1e9:,.1f} GB"


def check_training(GPT, config, batch_size, ranks, step):
    """Raises UserError if a run from that step on cannot fit into the machine's memory, with all of
    the machine's ranks. A GPU's own memory is not checked: such a run needs the machine's for its
    weights and data alone, which pass through it."""
    steps = config.max_steps - step
    if config.eval_only or kind_of(config.device) != "cpu":
        steps = 0
    tokens = batch_size * config.block_size
    floor = training_floor(config, count_params(GPT, config), tokens, ranks, steps)
    here = ranks
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")  # of torchrun
    if local.isdecimal():
        here = min(ranks, int(local))
    check_memory({setting: here * size for setting, size in floor.items()})


def check_sampling(model, config, ids, runtime):
    """Raises UserError if continuing prompts with these ids cannot fit into the machine's memory;
    config is that of sample.py."""
    texts, length = len(ids) * config.num_samples, 0
    if config.kv_cache:
        length = cache_length(model.config, ids, config.max_new_tokens)
    settings = "num_samples, max_new_tokens or the number of prompts"
    floor = {settings: TEXT * texts}
    if runtime.device.type == "cpu" and config.max_new_tokens:
        decoding = Decoding(texts, 1, length, runtime.dtype)
        floor = decoding_floor(model.config, num_params(model), decoding, settings)
    check_memory(floor)
