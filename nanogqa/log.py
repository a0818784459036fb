"""What a run logs: metrics.jsonl, wandb, and lines above a progress bar."""
import json
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from nanogqa import schema
from nanogqa.configurator import UserError, one_line, plural
from nanogqa.distributed import first_rank
from nanogqa.files import append, replacing, write_json
from nanogqa.terminal import reason, warn, without_none
from nanogqa.timing import profiler

# formats of numbers on the terminal; others have four digits
FORMATS = {"lr": ".2e", "grad_norm": ".2f", "tokens_per_sec": ",.0f", "mfu": ".1%"}
NOT_SHOWN = ("step", "tokens", "skipped")


ROW = {"step": schema.count, str: schema.number_or_none}  # a line of metrics.jsonl


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


def finite_or_none(value):
    """value for JSON: NaN and inf become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- where rows go ---------------------------------------------------------------------------------

class Backlog:
    """Rows on their way to a file or a service. While that fails they are kept, and each new row
    tries again to write all of them."""

    def __init__(self, name, write):
        self.name = name
        # a function of a list of rows; it raises an exception if it fails, and may remove from the
        # list those that it has written
        self.write = write
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
        if not first_rank():
            return
        path = Path(config.out_dir) / "metrics.jsonl"
        self.backlogs = [Backlog(path, RowFile(path, start).write)]
        if config.wandb_log:
            self.wandb = start_wandb(config)
            self.backlogs.append(Backlog("wandb", self.write_wandb))
        elif config.init_from != "resume":  # of a run that this one replaces
            (Path(config.out_dir) / "wandb.json").unlink(missing_ok=True)
        for backlog in self.backlogs:
            backlog.flush()
        # tqdm's disable=None: no bar where the output is not a terminal
        self.bar = tqdm(total=config.max_steps, initial=max(0, start), desc=config.out_dir,
                        unit="step", disable=None)

    def write_wandb(self, rows):
        while rows:
            self.wandb.log(without_none(rows[0]))
            rows.pop(0)  # after a failure, the next attempt must not log it again

    def advance(self, step):
        """The run has done that many steps: called after each one."""
        self.trace.step()
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def row(self, **row):
        """Logs one row: a dict of numbers, None where there is none at this step."""
        if self.bar is None:
            return
        row = {key: finite_or_none(value) for key, value in row.items()}
        for backlog in self.backlogs:
            backlog.add(row)
        known = without_none(row)
        text = f"step {row['step']:>6}"
        for key, value in known.items():
            if key not in NOT_SHOWN:
                text += f"  {key} {value:{FORMATS.get(key, '.4f')}}"
        if row["skipped"]:
            text += f"  {plural(row['skipped'], 'step')} skipped (gradient not finite)"
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
                    f"{plural(len(backlog.rows), 'row')} could not be written to {backlog.name} "
                    f"({backlog.failed}): fix that before the next run; the checkpoint is saved")

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


# -- wandb -----------------------------------------------------------------------------------------

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
        # not wandb's own steps: it drops rows of steps that a resumed run repeats
        run.define_metric("*", step_metric="step")
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
