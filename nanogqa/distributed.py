"""Several ranks: the process group, models split over ranks, stop signals, the end of a rank."""
import contextlib
import ctypes
import datetime
import importlib.util
import os
import signal
import sys
import traceback
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from nanogqa.configurator import UserError, drop_output, one_line


class World(NamedTuple):
    rank: int                     # of this process, from 0 to ranks - 1
    ranks: int
    local_rank: int               # of this process among those of its machine


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world():
    """The World of this process, as torchrun sets it; World(0, 1, 0) without torchrun."""
    rank = os.environ.get("RANK", "0")
    ranks = os.environ.get("WORLD_SIZE", "1")
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if rank.isdecimal() and ranks.isdecimal() and local_rank.isdecimal():
        place = World(int(rank), int(ranks), int(local_rank))
        possible = max(place.rank, place.local_rank) < place.ranks
        if possible and (place.ranks == 1 or can_meet()):
            return place
    found = ", ".join(f"{name}={os.environ.get(name)!s:.40}" for name in TORCHRUN)
    raise UserError(
        f"{found} is not what torchrun sets: unset these variables, or start with torchrun")


def can_meet():
    """Whether all variables of torchrun are set, with an address and a port to meet at."""
    if not set(TORCHRUN) <= os.environ.keys() or os.environ["MASTER_ADDR"] == "":
        return False
    port = os.environ["MASTER_PORT"]
    return port.isdecimal() and len(port) < 6 and int(port) < 2**16


def first_rank():
    """Whether this process is the one that writes and prints for all."""
    return world().rank == 0


# -- the process group -----------------------------------------------------------------------------

@contextlib.contextmanager
def process_group():
    """Joins the ranks, if there are several, while it is open. Errors of lost ranks and of
    torch.compile become UserErrors. After any error the group stays: run_and_exit ends the process.
    """
    with readable_errors():
        if world().ranks > 1:
            join_ranks()
        yield
        if world().ranks > 1:
            dist.destroy_process_group()


def join_ranks():
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # PR_SET_PDEATHSIG: no rank waits for a torchrun that was killed
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    # torchrun's own store is up before its ranks are; another one may take a while
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = datetime.timedelta(seconds=10 if by_agent else 600)
    try:
        store, rank, ranks = next(rendezvous("env://", timeout=timeout))
    except dist.DistError:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"nothing answers at {place}, where the ranks meet: start all of them again") from None
    store.set_timeout(datetime.timedelta(minutes=10))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
        # After a restart, torchrun's store still holds the addresses of the dead ranks, and torch
        # 2.13 lets the new ones read them. So each attempt has its own names, where one agent
        # counts the attempts for all.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


def barrier():
    """Returns once all ranks have called it."""
    if world().ranks > 1:
        dist.all_reduce(torch.zeros(()))


def sum_over_ranks(value):
    """The sum over ranks of a tensor or number, as a new tensor."""
    value = torch.as_tensor(value).clone()
    if world().ranks > 1:
        dist.all_reduce(value)
    return value


def agree(value):
    """Whether a whole number below 2**52 is the same on all ranks."""
    here = torch.tensor([value, -value], dtype=torch.float64)
    if world().ranks > 1:
        dist.all_reduce(here, dist.ReduceOp.MAX)
    return bool(here[0] == -here[1])


def lost(error):
    """Whether another rank's end caused an exception; some of gloo's are a plain RuntimeError."""
    from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return world().ranks > 1 and (isinstance(error, dist.DistError) or from_gloo)


@contextlib.contextmanager
def readable_errors():
    """Turns errors of lost ranks and of torch.compile into UserErrors."""
    try:
        yield
    except RuntimeError as error:
        if any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__):
            raise UserError(f"torch.compile does not work here ({one_line(error)}): add "
                            "--compile=False") from None
        if lost(error):
            raise UserError(f"the ranks lost each other ({one_line(error)}): if another rank has "
                            "exited, start all of them again with --init_from=auto; if they never "
                            "met, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network card "
                            "that their machines share") from None
        raise


def run_and_exit(main):
    """Runs a program's main(), then ends the process with its exit code."""
    try:
        main()
    except SystemExit as error:
        # error keeps the frames of main alive, and with them DDP. Freed after the group, DDP would
        # hold the interpreter's lock while it waits for a thread of gloo that waits for this lock.
        end(error.code or 0)
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        end(1)
    end(0)


def end(code):
    """Ends the process. With several ranks nothing is freed first: threads of the process group
    outlive destroy_process_group and can abort a finalizing interpreter."""
    drop_output()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    os._exit(code)


# -- stop signals ----------------------------------------------------------------------------------

def stopping_signals():
    """The signals that stop a run. SIGHUP comes when a terminal closes; nohup ignores it. torchrun
    passes it on to its ranks even so, and would kill ranks that ignore it."""
    by_agent = "TORCHELASTIC_RUN_ID" in os.environ
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not by_agent:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class StopSignal:
    """While it is open, Ctrl-C, SIGTERM and SIGHUP set .number, and the loop stops at the next
    step.

    A second Ctrl-C ends the program at once. After a stop, a process that goes on must restore().
    """

    def __enter__(self):
        self.number = 0
        self.parent = os.getppid()
        self.before = {}
        for number in stopping_signals():
            self.before[number] = signal.signal(number, self.catch)
        return self

    def catch(self, number, frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def __exit__(self, kind, *error):
        # after a stop, further SIGTERM and SIGHUP are caught until the program ends, which keeps
        # its exit code: a killed agent sends one for each of its threads
        if not self.number or kind not in (None, SystemExit):
            self.restore()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, runtime):
        """The signal that any rank has received: they arrive at different moments, but all ranks
        must stop at the same step."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            self.number = self.number or signal.SIGTERM  # torchrun was killed
        if runtime.ranks == 1:
            return self.number
        number = torch.tensor(self.number)  # on the CPU, so that it does not wait for the GPU
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()


# -- a copy of the model on each rank (DDP) --------------------------------------------------------

def replicate(model, config):
    """model under DDP, where there are several ranks that each have a copy."""
    if world().ranks == 1 or config.parallel == "fsdp":
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def synchronizing(model, wanted):
    """A context manager for a forward and backward pass: DDP averages gradients only if wanted."""
    if isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


# -- models split over ranks (FSDP2) ---------------------------------------------------------------

# PyTorch's modules for FSDP and sharded checkpoints take long to import, and few runs need them, so
# the functions that use them import them.

def check_parallel(config, ranks):
    """Raises UserError if --parallel=fsdp cannot work on that many ranks."""
    if config.parallel != "fsdp":
        return
    if config.optimizer == "muon":
        raise UserError("parallel=fsdp splits the matrices, but Muon needs whole ones: choose "
                        "--optimizer=adamw or --parallel=ddp")
    if ranks == 1:
        raise UserError("parallel=fsdp splits a model over ranks, but there is one rank: start "
                        "with torchrun, or choose --parallel=ddp")
    if importlib.util.find_spec("safetensors") is None:
        raise UserError("parallel=fsdp writes checkpoints with safetensors, which is not "
                        "installed: pip install safetensors")


def shard(model, runtime, weight_of):
    """Splits the weights of each block of a meta model over the ranks; it is never whole on a
    device. weight_of(name, shape) is the whole tensor of a parameter, or None for no values yet.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(runtime.device.type, (runtime.ranks,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # cos and sin stay float32
    if runtime.dtype != torch.float32:
        policy = MixedPrecisionPolicy(runtime.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        if runtime.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=runtime.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weight_of(name, parameter.shape)
            if weight is not None:
                parameter.copy_(placed(weight, parameter))


def cause(error):
    """The first exception behind a CheckpointException of torch, whose own text is a traceback; any
    other error itself."""
    for failure, _ in getattr(error, "failures", {}).values():
        return failure
    return error


def placed(x, parameter):
    """Moves the whole tensor x to parameter's device, split over ranks if parameter is."""
    x = x.to(parameter.device)
    if not split_over_ranks(parameter):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def split_over_ranks(x):
    """Whether a tensor is a DTensor, whose class may not be imported."""
    return hasattr(x, "full_tensor")


def whole(x):
    """A tensor that may be split over ranks, as a whole. All ranks call it."""
    return x.full_tensor() if split_over_ranks(x) else x


def local(x):
    """A tensor, or this rank's part of one that is split."""
    return x.to_local() if split_over_ranks(x) else x
