"""Measures what the schedule and a mean of weights change about the noise between seeds.

    python results/noise_schedule.py

Trains MHA as results/compare does, with as many of its seeds, but at a constant learning rate. At
step 640 each run divides: one half goes on at that rate, in the other it falls to 0 until step 800.
The weights of the first half at its last evaluations are also averaged. Two runs train at a time,
with one thread each. They go to out/noise_schedule; finished ones are not repeated, and interrupted
ones continue. Takes about 15 minutes on two CPU cores. Writes results/noise_schedule.json.
"""
import datetime
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from noise import AT_A_TIME, ROOT, train, window_losses  # adds the root to sys.path

from model import GPTConfig
from nanogqa import checkpoint, folder
from nanogqa.configurator import parse, program
from nanogqa.files import write_json
from nanogqa.log import read_rows
from nanogqa.results import curve_of
from nanogqa.runtime import describe_machine, pick_runtime
from train import TrainConfig

SEEDS = range(1, 7)
STEPS, DIVIDE, INTERVAL = 800, 640, 40
AVERAGED = [640, 680, 720, 760, 800]  # steps
FLAGS = [f"--eval_interval={INTERVAL}", f"--keep_checkpoints={len(AVERAGED)}", "--schedule=wsd",
         "--device=cpu", "--dtype=float32"]
RUNS = ROOT / "out/noise_schedule"


@dataclass
class Losses:
    """Of one seed, in nats per token."""
    constant: list[tuple[int, float]]  # (step, loss) of each evaluation at the constant rate
    cooldown: float                    # last loss after the rate has fallen
    mean_of_weights: float             # of the mean of the weights at the steps AVERAGED


def continued(out_dir, seed, max_steps, cooldown):
    """Trains out_dir up to max_steps, from where it stands."""
    init_from = "scratch"
    if folder.exists(out_dir):
        init_from = "resume"
    train(out_dir, [*FLAGS, f"--seed={seed}", f"--max_steps={max_steps}", f"--cooldown={cooldown}",
                    f"--init_from={init_from}"])


def measure(seed):
    """The Losses of a seed, after training what is missing."""
    constant, cooled = RUNS / f"constant{seed}", RUNS / f"cooldown{seed}"
    if not folder.exists(cooled):
        continued(constant, seed, DIVIDE, cooldown=0)
        shutil.rmtree(cooled, ignore_errors=True)  # of an interrupted copy
        copy = RUNS / f"copy{seed}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(constant, copy)
        copy.rename(cooled)
    continued(constant, seed, STEPS, cooldown=0)
    continued(cooled, seed, STEPS, cooldown=1 - DIVIDE / STEPS)
    return Losses(
        constant=curve_of(read_rows(constant / "metrics.jsonl")),
        cooldown=checkpoint.load(cooled, GPTConfig)["val_loss"],
        mean_of_weights=loss_of_mean([constant / f"ckpt_{step}.pt" for step in AVERAGED]),
    )


def loss_of_mean(paths):
    """The loss of a model whose weights are the mean of those of some checkpoints."""
    first, *others = paths
    mean = checkpoint.load(first, GPTConfig)
    for path in others:
        for name, weight in checkpoint.load(path, GPTConfig)["model"].items():
            mean["model"][name] += weight
    for weight in mean["model"].values():
        weight /= len(paths)
    return window_losses(mean).mean().item()


@program
def main(argv):
    parse(TrainConfig, argv, __doc__)  # for --help
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = list(pool.map(measure, SEEDS))
    machine = describe_machine(pick_runtime("cpu", "float32", False), ranks=1)
    results = dict(
        command="python results/noise_schedule.py",
        date=datetime.date.today().isoformat(),
        machine=machine | {"threads": 1},  # of each run, see train() of noise.py
        runs=[asdict(run) for run in runs],
    )
    for name in ("cooldown", "mean_of_weights"):
        deviation = statistics.stdev(run[name] for run in results["runs"])
        print(name, f"{deviation:.4f} nats, standard deviation")
    write_json(ROOT / "results/noise_schedule.json", results)


if __name__ == "__main__":
    main()
