"""The training runs of a comparison: how far each has got, and training the rest with train.py.

The class GPTConfig, which this package does not import, is passed in.
"""
import math
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from nanogqa import checkpoint, folder
from nanogqa.configurator import UserError, one_line, subset
from nanogqa.log import read_rows
from nanogqa.results import evaluations, is_recorded, metrics_of, quantity, recorded_runs

TRAIN = Path(__file__).parents[1] / "train.py"


# -- how far a run has got -------------------------------------------------------------------------

@dataclass
class Run:
    """One training run; variants that are one model in both matchings share it."""
    config: object                # its TrainConfig, complete except for seed and out_dir
    key: str                      # of its variant: see Variant of compare.py
    seed: int
    folder: Path
    steps: int = 0                # done so far: see look
    finished: bool = False
    damage: str = ""              # why it cannot be resumed and starts again; empty: it can

    def rows(self):
        rows = read_rows(self.folder / "metrics.jsonl")
        return [row for row in rows if row["step"] <= self.config.max_steps]

    def look(self, dataset, records, GPTConfig):
        """Reads from its folder how far it has got. records are those of recorded_runs.

        It counts as finished if its checkpoint is that of the last step, and if metrics.jsonl holds
        all evaluations up to it, the last with the loss of the checkpoint. A run that is recorded
        in results.json may have lost its checkpoint. Raises UserError if the folder holds another
        run, or a checkpoint that cannot be read here although it may be whole.
        """
        self.steps, self.finished, self.damage = 0, False, ""
        if not folder.exists(self.folder):
            record = records.get(self.folder.name)
            if record is not None and is_recorded(self.rows(), record):
                self.steps, self.finished = self.config.max_steps, True
            elif (self.folder / folder.BEST).exists():
                self.damage = f"it has no {folder.NEWEST}"
            return
        try:
            state = checkpoint.load(self.folder, GPTConfig)
        except checkpoint.Damaged:
            self.damage = "its checkpoint is damaged"
            return
        model = asdict(subset(GPTConfig, self.config))
        mine = (model, self.seed, dataset.meta["sha256"])
        if (state["config"], state["settings"].get("seed"), state["dataset_sha256"]) != mine:
            raise UserError(f"{self.folder} holds another run: move it away, and run the same "
                            "command again")
        self.damage = damage_of(self.rows(), state, self.config)
        if not self.damage:
            self.steps = state["step"]
            evaluated = state["val_loss"] is not None
            self.finished = evaluated and self.steps == self.config.max_steps


def damage_of(rows, state, config):
    """Why rows, of metrics.jsonl, do not fit the checkpoint state, as text; empty if they do."""
    if state["step"] > config.max_steps:
        return "its checkpoint is of a later step"
    evaluated = evaluations([row for row in rows if row["step"] <= state["step"]])
    wanted = list(range(0, state["step"] + 1, config.eval_interval))
    if state["val_loss"] is not None and state["step"] not in wanted:
        wanted.append(state["step"])
    if [row["step"] for row in evaluated] != wanted:
        return "its metrics.jsonl does not hold each evaluation once"
    for row in evaluated:
        if not all(map(quantity, metrics_of(row).values())):
            return "its metrics.jsonl holds impossible values"
    if state["val_loss"] not in (None, evaluated[-1]["val_loss"]):
        return "its metrics.jsonl and its checkpoint hold different losses"
    return ""


# -- training the rest -----------------------------------------------------------------------------

def train_runs(runs, config, results, dataset, GPTConfig):
    """Trains every run that is not finished, with one progress bar for all of them."""
    speed, records = results["speed"], recorded_runs(results)
    for run in runs:
        if run.damage:
            print(f"{run.folder.name} starts again: {run.damage}")
    finished = [run for run in runs if run.finished]
    minutes = remaining_seconds(runs, config, speed, dataset) / 60
    print(f"{len(runs)} runs of {config.max_steps:,} steps, {len(finished)} of them finished; the "
          f"rest takes about {minutes:.0f} minutes at the speeds that were timed", flush=True)
    done = sum(run.steps for run in runs)
    total = len(runs) * config.max_steps
    with tqdm(total=total, initial=done, unit="step", desc="training", disable=None) as bar:
        for run in runs:
            if not run.finished:
                run_training(run, bar)
                run.look(dataset, records, GPTConfig)
            if run.damage:
                raise UserError(f"training {run.folder.name} ended, but {run.damage}: see "
                                f"{run.folder / 'train.log'}, or choose another --out_dir to leave "
                                "this variant out")
            if not run.finished:
                raise UserError(f"training {run.folder.name} ended at step {run.steps}: run the "
                                f"same command again, and see {run.folder / 'train.log'}")


def remaining_seconds(runs, config, speed, dataset):
    """Estimated time of the steps left. Evaluating a token takes a third of training on it, and n
    ranks are taken to be n times as fast as the one that was timed."""
    n_evaluations = math.ceil(config.max_steps / config.eval_interval) + 1
    eval_tokens = min(config.eval_tokens or math.inf, dataset.val.n_tokens)
    tokens_of_run = config.max_steps * config.tokens_per_step + n_evaluations * eval_tokens / 3
    seconds = 0.0
    for run in runs:
        share_left = max(0, config.max_steps - run.steps) / config.max_steps
        seconds += share_left * tokens_of_run / speed[run.key]["train"][0]["tok_s"]
    return seconds / ranks_of(config)


def run_training(run, bar):
    """Trains or resumes one run with train.py and moves bar by its steps."""
    run.folder.mkdir(parents=True, exist_ok=True)
    start = run.steps
    bar_start = bar.n
    last_line, error = "no output", ""
    with (
        open(run.folder / "train.log", "a", encoding="utf-8") as log,
        subprocess.Popen(train_command(run), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         encoding="utf-8", errors="replace") as process,
    ):
        for line in process.stdout:
            log.write(line)
            last_line = line.strip() or last_line
            if line.startswith(f"{TRAIN.name}: "):  # torchrun prints a report of its own after it
                error = line.strip()
            step = re.match(r"step +(\d+)", line)
            if step:
                now = bar_start + int(step[1]) - start
                bar.update(max(0, now - bar.n))
    if process.returncode:
        reason = one_line(error or last_line)
        raise UserError(f"training {run.folder.name} ended with code {process.returncode} "
                        f"({reason}): see {run.folder / 'train.log'}; run the same command again "
                        "to resume, or choose another --out_dir to leave this variant out")


def ranks_of(config):
    """The number of ranks of a run: one for each GPU."""
    if config.device in ("auto", "cuda"):
        return max(1, torch.cuda.device_count())
    return 1


def train_command(run):
    """The command of train.py, under torchrun where there are several GPUs."""
    command = [sys.executable]
    if ranks_of(run.config) > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={ranks_of(run.config)}"]
    command.append(TRAIN)
    config = replace(run.config, seed=run.seed, out_dir=str(run.folder), init_from="auto")
    if config.wandb_run_name is not None:
        config.wandb_run_name += f" {run.folder.name}"
    if run.damage:
        config.init_from = "scratch"
        config.overwrite = True
    for key, value in asdict(config).items():
        command.append(f"--{key}={value}")
    return command
