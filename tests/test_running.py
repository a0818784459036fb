"""What a run endures: full disks, lost terminals, signals, foreign files, what killed runs leave."""
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load
from test_data import file_with_truncation
from test_inputs import fails
from test_train import ROOT, equal, out, rows, weights

import bench
import compare
import convert
import sample
import train
from nanogqa import checkpoint, costs, distributed, files, folder, log, resume, runtime, saver as writes, timing
from nanogqa.configurator import UserError, program
from nanogqa.writer import write_dataset

STOP_SIGNAL = distributed.StopSignal
SHORT = ["--max_steps=2", "--eval_interval=10", "--log_interval=1"]


def at_steps(monkeypatch, actions):
    """Calls actions[step]() at the beginning of that step of a run from scratch."""
    class At(STOP_SIGNAL):
        calls = 0

        def agreed(self, runtime):
            self.calls += 1
            actions.get(self.calls - 1, int)()
            return super().agreed(runtime)
    monkeypatch.setattr(distributed, "StopSignal", At)


# -- a full disk -----------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Writes until no byte fits on the disk."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (2**16, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break


DISK = ["--max_steps=28", "--eval_interval=8", "--log_interval=1"]


def test_a_full_disk_that_is_freed_costs_nothing(toy_run, tmp_path, small_disk, monkeypatch, capsys):
    """While not even one byte fits: five kB of rows, and checkpoints."""
    train.main(out([*toy_run, *DISK], tmp_path / "whole"))
    capsys.readouterr()
    at_steps(monkeypatch, {3: lambda: fill(small_disk),
                           26: lambda: os.unlink(small_disk / "filler")})
    train.main(out([*toy_run, *DISK], small_disk / "run"))
    error = capsys.readouterr().err
    assert error.count("metrics.jsonl (No space left on device): its rows are kept") == 1, error
    assert "warning: cannot save step 8" in error and "free 1 MiB" in error
    assert equal(weights(tmp_path / "whole"), weights(small_disk / "run"))
    assert rows(tmp_path / "whole") == rows(small_disk / "run")


def test_a_disk_that_stays_full_costs_the_steps_since_the_checkpoint(
        toy_run, small_disk, monkeypatch, capsys):
    args = out([*toy_run, *DISK, "--init_from=auto"], small_disk / "run")
    with monkeypatch.context() as patch:
        at_steps(patch, {19: lambda: fill(small_disk)})
        with pytest.raises(SystemExit) as exit:
            train.main(args)
    error = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "cannot save step 28" in error[-1]
    assert all(line.startswith("warning: ") for line in error[:-1]), "no traceback"
    assert load(small_disk / "run")["step"] == 16
    os.unlink(small_disk / "filler")
    train.main(args)
    assert [row["step"] for row in rows(small_disk / "run")] == list(range(29))


def test_a_rank_that_has_saved_tries_again_with_one_that_has_not(tmp_path, monkeypatch):
    """Otherwise the other rank would wait for it forever."""
    saver = writes.ShardedSaver(train.TrainConfig(out_dir=str(tmp_path)), rank=1)
    monkeypatch.setattr("torch.distributed.checkpoint.save", lambda *args, **kwargs: None)
    state = dict(step=1, val_loss=None, model={}, optimizer=dict(state={}))
    for failed in (1.0, 0.0):
        monkeypatch.setattr(writes, "sum_over_ranks", lambda mine, failed=failed: mine + failed)
        saver.save(state)
        assert bool(saver.failed) == bool(failed)


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("number,remedy", [
    (errno.ENOSPC, "free 1 MiB"), (errno.EACCES, "check its disk and permissions"), (errno.EROFS, "check its disk and permissions")])
def test_a_failed_save_names_the_remedy_of_its_error(tmp_path, monkeypatch, capsys, number, remedy):
    """It asked for room whatever the error was."""
    def fails_to_save(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(writes, "save", fails_to_save)
    saver = writes.Saver(train.TrainConfig(out_dir=str(tmp_path)))
    saver.save(dict(step=8, val_loss=None, model=dict(x=torch.zeros(9)), optimizer={}))
    saver.wait()
    assert f"({os.strerror(number)}): {remedy}; nothing is saved yet" in saver.failed
    assert "while the run goes on, each log line tries again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["append", "replacing"])
def test_rows_wait_for_room(toy_run, tmp_path, monkeypatch, capsys, name):
    """The rows that are added, and those that a resumed run writes again when it starts."""
    train.main([*toy_run, "--max_steps=6", "--log_interval=1"])
    whole = getattr(log, name)
    monkeypatch.setattr(log, name, full)
    at_steps(monkeypatch, {8: lambda: monkeypatch.setattr(log, name, whole)})
    train.main([*toy_run, "--log_interval=1", "--init_from=resume"])
    assert capsys.readouterr().err.count("its rows are kept") == 1
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(21))
    monkeypatch.setattr(log, name, full)
    error = fails_last(train.main, [*toy_run, "--init_from=resume", "--max_steps=25"], capsys)
    assert ": 1 row could not be written to" in error
    assert load(tmp_path / "run")["step"] == 25


def fails_last(main, args, capsys):
    """Like fails, after warnings."""
    with pytest.raises(SystemExit) as exit:
        main(args)
    error = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and all(line.startswith("warning: ") for line in error[:-1]), error
    return error[-1]


def test_text_is_appended_whole_or_not_at_all(tmp_path):
    """Half of the text fits: RLIMIT_FSIZE stands in for a full disk."""
    import resource
    path = tmp_path / "file"
    files.append(path, "a" * 50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70, limits[1]))
    try:
        with pytest.raises(OSError):
            files.append(path, "b" * 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text(encoding="utf-8") == "a" * 50
    files.append(path, "c")
    assert path.read_text(encoding="utf-8") == "a" * 50 + "c"


@pytest.mark.parametrize("text", ["", '{"traceEvents": [{"na'])
def test_a_trace_that_does_not_fit_is_left_out(toy_run, tmp_path, monkeypatch, capsys, text):
    """The profiler ignores a full disk and leaves a part."""
    import torch
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace",
                        lambda self, path: Path(path).write_text(text))
    train.main([*toy_run, "--profile=True"])
    assert "trace.json (it is incomplete): the run goes on" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("trace*")) and load(tmp_path / "run")["step"] == 20


# -- a lost terminal -------------------------------------------------------------------------------

def lost():
    """A stream whose reader is gone, as a terminal that was closed or `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def full_device():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    return open("/dev/full", "w")


@pytest.mark.parametrize("stream", [lost, full_device])
def test_a_run_does_not_need_its_terminal(toy_run, tmp_path, monkeypatch, stream):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    train.main([*toy_run, *SHORT])
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    with pytest.raises(SystemExit) as exit:
        train.main([*toy_run, *SHORT])
    assert exit.value.code == 2, "the refusal is not printed, but is one"


def test_a_process_without_output_ends_as_any_other(toy_run, tmp_path):
    """Python itself would end with exit code 120 where its last flush fails."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    command = [sys.executable, "train.py", *toy_run, "--max_steps=1", "--eval_interval=1"]
    shell = ["sh", "-c", 'exec "$@" >&- 2>/dev/full', "sh", *command]
    done = subprocess.run(shell, cwd=ROOT, timeout=100)
    assert done.returncode == 0 and load(tmp_path / "run")["step"] == 1
    assert len(rows(tmp_path / "run")) == 2, "metrics.jsonl holds rows and nothing that was printed"


MAINS = [train.main, sample.main, bench.main, compare.main, convert.main]


@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__module__)
def test_programs_without_output_end_as_they_would_with_it(monkeypatch, main):
    for args, code in ((["--help"], 0), (["--no_such=1"], 2)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", None)
            patch.setattr(sys, "stderr", None)
            try:
                assert main(args) is None and code == 0
            except SystemExit as exit:
                assert exit.code == code


def test_all_programs_have_the_rules_of_program():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*/prepare.py")]:
        text = path.read_text(encoding="utf-8")
        if "\ndef main(" in text:
            assert re.search(r"^@program.*\ndef main\(argv\):", text, re.M), path


def printing(*texts):
    """A program that prints."""
    @program
    def main(argv):
        for text in texts:
            print(text)
    return main


def test_a_terminal_of_another_encoding_gets_question_marks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    printing("élan", "\udc80")([])
    stream.seek(0)
    assert stream.read() == "?lan\n?\n"


def test_results_that_cannot_be_printed_are_an_error(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            full()
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    error = fails(printing("text"), [], capsys)
    assert "cannot write (No space left on device): check the disk, and where" in error


# -- signals ---------------------------------------------------------------------------------------

def test_a_closed_terminal_stops_a_run_as_sigterm_does(toy_run, tmp_path, monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite may run under nohup
    with monkeypatch.context() as patch:
        at_steps(patch, {7: lambda: os.kill(os.getpid(), signal.SIGHUP)})
        with pytest.raises(SystemExit) as exit:
            train.main(toy_run)
    signal.signal(signal.SIGHUP, before)
    assert exit.value.code == 128 + signal.SIGHUP and load(tmp_path / "run")["step"] == 7
    assert "stopped by SIGHUP after step 7 and saved" in capsys.readouterr().out


def test_ctrl_c_saves_and_a_second_one_ends_at_once(toy_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_steps(patch, {7: lambda: os.kill(os.getpid(), signal.SIGINT)})
        with pytest.raises(SystemExit) as exit:
            train.main(toy_run)
    assert exit.value.code == 130 and load(tmp_path / "run")["step"] == 7
    stop = STOP_SIGNAL()
    try:
        with stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()


def test_a_stopped_run_keeps_its_exit_code(monkeypatch):
    """Its handlers were gone while it ended, so that a second SIGTERM of torchrun's killed it."""
    before = signal.getsignal(signal.SIGTERM)
    stop = STOP_SIGNAL()
    try:
        with pytest.raises(SystemExit), stop:
            os.kill(os.getpid(), signal.SIGTERM)
            raise SystemExit(143)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(UserError), stop:
        os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("another error")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("agent,code", [(None, None), ("a", 129)])
def test_nohup_is_respected_except_where_torchrun_passes_the_signal_on(
        toy_run, tmp_path, monkeypatch, agent, code):
    if agent:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", agent)
    at_steps(monkeypatch, {1: lambda: os.kill(os.getpid(), signal.SIGHUP)})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.main([*toy_run, *SHORT])
        assert code is None and load(tmp_path / "run")["step"] == 2
    except SystemExit as exit:
        assert exit.code == code and load(tmp_path / "run")["step"] == 1
    finally:
        signal.signal(signal.SIGHUP, before)


# -- foreign files, and what is left behind --------------------------------------------------------

def test_foreign_files_are_left_alone(toy_run, tmp_path):
    folder = tmp_path / "run"
    names = ["ckpt_007.pt", "ckpt_copy.pt", "ckpt_1 (2).pt", "ckpt_5000.pt", "ckpt_²°.pt",
             "notes.part", "sharded_backup/state.json", "sharded_007/state.json", "sharded_/x"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("foreign")
    args = [*toy_run, "--eval_interval=2", "--keep_checkpoints=1"]
    train.main([*args, "--max_steps=6"])
    train.main([*args, "--max_steps=8", "--init_from=resume"])
    sample.main([f"--out_dir={folder}", "--max_new_tokens=1", "--device=cpu"])
    assert all((folder / name).read_text(encoding="utf-8") == "foreign" for name in names)
    kept = [path.name for path in folder.glob("ckpt_*.pt") if path.name not in names]
    assert sorted(kept) == ["ckpt_8.pt", "ckpt_best.pt"]


def test_an_old_checkpoint_that_is_gone_already_is_not_missed(toy_run, tmp_path, monkeypatch, capsys):
    """Someone has deleted the file that is to be removed: the new one is saved all the same."""
    def delete():
        deadline = time.time() + 60
        while not (tmp_path / "run/ckpt_5.pt").exists():  # a thread writes it
            assert time.time() < deadline
            time.sleep(0.01)
        (tmp_path / "run/ckpt_5.pt").unlink()
    at_steps(monkeypatch, {6: delete})
    train.main([*toy_run, "--max_steps=10", "--eval_interval=5", "--keep_checkpoints=1"])
    assert "warning" not in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").glob("ckpt_[0-9]*.pt")] == ["ckpt_10.pt"]


def test_a_sharded_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    (tmp_path / "sharded_4").mkdir()
    (tmp_path / "sharded_4/state.json").write_text("{}")
    saver = writes.ShardedSaver(train.TrainConfig(out_dir=str(tmp_path)), best=2.5)

    def half(*args, storage_writer, **kwargs):
        (tmp_path / "sharded_8").mkdir()
        (tmp_path / "sharded_8/shard-00001.safetensors").write_text("half")
        full()
    monkeypatch.setattr("torch.distributed.checkpoint.save", half)
    saver.save(dict(step=8, val_loss=1.5, model={}, optimizer=dict(state={})))
    assert "cannot save step 8" in saver.failed and "free some space" in capsys.readouterr().err
    assert saver.best == 2.5 and folder.find_sharded(tmp_path) == tmp_path / "sharded_4"
    assert not (tmp_path / "sharded_8").exists(), "the next attempt needs its room"


def test_a_new_run_keeps_its_own_checkpoints_beside_later_ones_of_another(toy_run, tmp_path):
    args = [*toy_run, "--keep_checkpoints=2"]
    train.main([*args, "--max_steps=20"])
    train.main([*args, "--max_steps=10", "--overwrite=True", "--eval_interval=5"])
    steps = [load(path)["step"] for path in sorted((tmp_path / "run").glob("ckpt_[0-9]*.pt"))]
    assert {5, 10} <= set(steps)


def test_a_resumed_run_removes_its_own_old_checkpoints_alone(toy_run, tmp_path, monkeypatch):
    """It took all ckpt_STEP.pt for its own: it removed one of its last two, and kept one of a run before it."""
    def names():
        return sorted(path.name for path in (tmp_path / "run").glob("ckpt_[0-9]*.pt"))
    args = [*toy_run, "--keep_checkpoints=2", "--max_steps=20"]
    train.main([*args, "--eval_interval=9"])
    assert names() == ["ckpt_18.pt", "ckpt_20.pt"]
    with monkeypatch.context() as patch:
        at_steps(patch, {13: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        with pytest.raises(SystemExit):
            train.main([*args, "--eval_interval=4", "--overwrite=True"])
    assert load(tmp_path / "run")["kept"] == [8, 12, 13], "8 was removed after this was written"
    train.main([*args, "--eval_interval=4", "--init_from=resume", "--max_steps=16"])
    assert names() == ["ckpt_13.pt", "ckpt_16.pt", "ckpt_18.pt", "ckpt_20.pt"]
    state = load(tmp_path / "run")
    del state["kept"]
    torch.save(state, tmp_path / "run/ckpt.pt")  # as it was before checkpoints said so
    train.main([*args, "--eval_interval=4", "--init_from=resume", "--max_steps=17"])
    assert names() == ["ckpt_16.pt", "ckpt_17.pt", "ckpt_18.pt", "ckpt_20.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_failed_save_leaves_every_name_as_it_was(tmp_path, monkeypatch, links):
    """Without hard links, a full disk left a new ckpt_best.pt beside an old ckpt.pt, and a part of a copy."""
    def state(step):
        return dict(step=step, model={"x": torch.ones(1000)})
    names = ("ckpt_best.pt", "ckpt_8.pt")
    if not links:
        monkeypatch.setattr(os, "link", full)
    writes.save(tmp_path, state(1), names)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["ckpt.pt", "ckpt_8.pt", "ckpt_best.pt"] and len(set(before.values())) == 1
    link, calls = writes.link, []

    def link_once(source, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_text("a part")
            full()
        return link(source, path)
    monkeypatch.setattr(writes, "link", link_once)
    with pytest.raises(OSError):
        writes.save(tmp_path, state(2), names)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_replaces_another_has_the_tokenizer_of_its_data(toy_run, tmp_path, monkeypatch):
    """That of the run before was kept: sample.py then refused the new checkpoint. A new run that ends before it trains
    leaves the old one as it was."""
    text = "some text to train on, and more of it. " * 60
    for name in ("a", "b"):
        source = file_with_truncation(tmp_path / name, {"a": 280, "b": 270}[name])
        write_dataset([("train", text), ("val", text)], tmp_path / f"data_{name}", source)
        args = [*toy_run, f"--dataset={tmp_path / f'data_{name}'}", "--eval_tokens=64", *SHORT, "--overwrite=True"]
        train.main(args)
    before = (tmp_path / "run/tokenizer.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "compile_model", lambda *args: (_ for _ in ()).throw(UserError("no")))
        train.main([*args, f"--dataset={tmp_path / 'data_a'}"])
    assert (tmp_path / "run/tokenizer.json").read_bytes() == before
    mine = '{"eos_token": "<|endoftext|>", "mine": 1}'
    (tmp_path / "run/tokenizer_config.json").write_text(mine)
    train.main([*args, "--overwrite=False", "--init_from=resume"])
    assert (tmp_path / "run/tokenizer_config.json").read_text(encoding="utf-8") == mine, "a resumed run keeps its own"
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (tmp_path / "data_b/tokenizer.json").read_bytes()
    sample.main([f"--out_dir={tmp_path / 'run'}", "--prompt=some", "--max_new_tokens=2", "--device=cpu"])
    train.main([*args, f"--out_dir={tmp_path / 'data_b'}"])
    assert (tmp_path / "data_b/tokenizer.json").exists(), "a run in the folder of its data set"


def test_parts_of_killed_runs_are_removed(toy_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    left = ["ckpt.pt.part", "ckpt_best.pt.part", "ckpt_20.pt.part", "metrics.jsonl.part",
            "trace.json.part", "wandb.json.part", "tokenizer.json.part", ".probe4242"]
    for name in [*left, "mine.part", ".probes"]:
        (folder / name).write_text("x")
    train.main([*toy_run, *SHORT])
    names = {path.name for path in folder.iterdir()}
    assert not names & set(left) and {"mine.part", ".probes"} <= names


@pytest.mark.parametrize("args", [["--vocab_size=17592186044416"], ["--n_head=5"],
                                  ["--trainable=no_such"]])
@pytest.mark.parametrize("state", ["missing", "empty", "used"])
def test_a_refusal_leaves_the_folder_as_it_was(toy_run, tmp_path, capsys, args, state):
    folder = tmp_path / "a/b/run"
    if state != "missing":
        folder.mkdir(parents=True)
    if state == "used":
        (folder / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    fails(train.main, [*toy_run, f"--out_dir={folder}", *args], capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("step,words", [
    (0, "training has not begun yet, so choose --dtype=float32 or another model"),
    (10, "lower learning_rate and continue with --init_from=resume")])
def test_the_remedy_fits_what_is_there(toy_run, tmp_path, monkeypatch, capsys, step, words):
    losses = iter([1.0] * (step // 10) + [float("nan")])
    monkeypatch.setattr(train, "evaluate", lambda *args: dict(val_loss=next(losses), val_bpb=1.0))
    error = fails(train.main, toy_run, capsys)
    assert f"at step {step} is not finite" in error and error.endswith(words)
    assert folder.exists(tmp_path / "run") == (step > 0)


# -- wandb and the progress bar --------------------------------------------------------------------

class WandbRun:
    """Stands in for a run of wandb."""

    def __init__(self, **kwargs):
        self.given, self.logged, self.broken = kwargs, [], False
        self.id = kwargs["id"] or f"run{len(RUNS)}"
        self.axes = {}
        RUNS.append(self)

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        if self.broken:
            raise RuntimeError("the service is gone")
        self.logged.append(row["step"])

    def finish(self):
        if self.broken:
            raise RuntimeError("the service is gone")


RUNS = []


@pytest.fixture
def wandb_runs(monkeypatch):
    """The WandbRuns that are started."""
    import wandb
    monkeypatch.setattr(wandb, "init", WandbRun)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    RUNS.clear()
    return RUNS


def test_a_resumed_run_continues_its_wandb_run(toy_run, tmp_path, wandb_runs, monkeypatch, capsys):
    args = [*toy_run, "--wandb_log=True"]
    train.main([*args, "--max_steps=1"])
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    train.main([*args, "--max_steps=2", "--init_from=resume"])
    train.main([*args, "--max_steps=1", "--overwrite=True"])
    assert [run.id for run in wandb_runs] == ["run0", "run0", "run2"]
    assert [run.given["resume"] for run in wandb_runs] == [None, "allow", None]
    folders = [run.given["dir"] for run in wandb_runs]
    assert folders == [str(tmp_path / "run"), *[str(tmp_path / "elsewhere")] * 2]
    for text in ("{", "[]", '{"id": 3}', '{"id": "../x"}', '{"id": ""}'):
        (tmp_path / "run/wandb.json").write_text(text)
        error = fails(train.main, [*args, "--init_from=resume"], capsys)
        assert "wandb.json does not hold the id of a wandb run" in error
    assert len(wandb_runs) == 3


def test_a_run_that_replaces_one_on_wandb_does_not_continue_it(toy_run, tmp_path, wandb_runs):
    """The id of the earlier run stayed where the new one did not log to wandb."""
    train.main([*toy_run, *SHORT, "--wandb_log=True"])
    train.main([*toy_run, "--max_steps=1", "--overwrite=True"])
    train.main([*toy_run, "--max_steps=2", "--init_from=resume", "--wandb_log=True"])
    assert [run.id for run in wandb_runs] == ["run0", "run1"]


def test_wandb_takes_the_steps_that_a_resumed_run_repeats(toy_run, tmp_path, wandb_runs):
    """By its own steps, wandb drops rows below the last one. So the step is a value, and the axis of all others."""
    train.main([*toy_run, "--max_steps=10", "--wandb_log=True"])
    shutil.copy(tmp_path / "run/ckpt.pt", tmp_path / "at10.pt")
    train.main([*toy_run, "--max_steps=20", "--wandb_log=True", "--init_from=resume"])
    shutil.copy(tmp_path / "at10.pt", tmp_path / "run/ckpt.pt")  # as if it was killed before it saved
    train.main([*toy_run, "--max_steps=20", "--wandb_log=True", "--init_from=resume"])
    assert [run.logged for run in wandb_runs] == [[0, 5, 10], [15, 20], [15, 20]]
    assert all(run.axes == {"*": "step"} for run in wandb_runs)


def test_a_lost_wandb_does_not_end_a_run(toy_run, tmp_path, wandb_runs, monkeypatch, capsys):
    def service(works):
        wandb_runs[0].broken = not works
    at_steps(monkeypatch, {4: lambda: service(False), 12: lambda: service(True)})
    train.main([*toy_run, "--wandb_log=True"])
    assert capsys.readouterr().err.count("cannot write to wandb (the service is gone)") == 1
    assert wandb_runs[0].logged == [0, 5, 10, 15, 20]
    at_steps(monkeypatch, {1: lambda: setattr(wandb_runs[1], "broken", True)})
    args = [*toy_run, *SHORT, "--wandb_log=True", "--overwrite=True"]
    assert "rows could not be written to wandb" in fails_last(train.main, args, capsys)
    assert json.loads((tmp_path / "run/wandb.json").read_text(encoding="utf-8")) == {"id": "run1"}


def test_wandb_gets_no_row_twice():
    """After a failure among several rows, all of them were sent again."""
    logged, answers = [], iter([None, RuntimeError("gone"), None, None])

    def send(row):
        answer = next(answers)
        if answer:
            raise answer
        logged.append(row["step"])
    sender = SimpleNamespace(wandb=SimpleNamespace(log=send))
    backlog = log.Backlog("wandb", lambda rows: log.Log.write_wandb(sender, rows))
    backlog.rows = [dict(step=1), dict(step=2)]
    backlog.flush()
    assert logged == [1] and backlog.failed
    backlog.add(dict(step=3))
    assert logged == [1, 2, 3] and backlog.failed is None


def test_the_progress_bar_moves_at_every_step(toy_run, monkeypatch):
    seen = []

    class Bar(log.tqdm):
        def update(self, n=1):
            self.n += n
            seen.append(self.n)
    monkeypatch.setattr(log, "tqdm", Bar)
    train.main([*toy_run, "--max_steps=7"])
    train.main([*toy_run, "--max_steps=9", "--init_from=resume"])
    assert seen == list(range(1, 10))


@pytest.mark.parametrize("seconds,words", [(59.4, "0 min 59 s"), (119.7, "2 min 0 s"), (3725.2, "62 min 5 s")])
def test_the_time_of_a_run_as_text(monkeypatch, seconds, words):
    """It was rounded after the division: 1 min 60 s."""
    rate = timing.Rate(1, 0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: rate.began + seconds)
    assert rate.elapsed() == words


def test_tokens_per_second_are_of_the_steps_since_the_last_restart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    rate = timing.Rate(100, step=7)
    now[0] = 4.0
    assert rate.at(9) == 50 and rate.at(7) is None
    rate.restart(9)
    now[0] = 5.0
    assert rate.at(10) == 100


def test_evaluations_and_saves_are_not_in_the_rate(toy_run, monkeypatch):
    calls, steps = [], []

    def record(owner, name):
        function = getattr(owner, name)

        def call(*args):
            calls.append(name)
            if name == "restart":
                steps.append(args[1])
            return function(*args)
        monkeypatch.setattr(owner, name, call)
    record(train, "evaluate")
    record(writes.Saver, "save")
    record(timing.Rate, "restart")
    train.main(toy_run)
    evaluation = ["evaluate", "save", "restart"]
    assert calls == ["restart", *evaluation, "restart", *evaluation, "restart", *evaluation]
    assert steps == [0, 0, 5, 10, 15, 20]


# -- what an error or another run must not cost --------------------------------------------------

def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power failure, a name without content would be left."""
    synced, named = set(), []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def recorded_replace(source, target):
        assert os.stat(source).st_ino in synced, target
        replace(source, target)
        named.append(os.path.basename(target))
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    for link in (os.link, refuse_links):
        monkeypatch.setattr(os, "link", link)
        writes.save(tmp_path, dict(step=1), ["ckpt_best.pt"])
    assert named == ["ckpt_best.pt", "ckpt.pt"] * 2


def refuse_links(source, target):
    raise OSError("no hard links here")


def test_a_checkpoint_that_is_being_written_outlives_an_error(toy_run, tmp_path, monkeypatch, capsys):
    """Several ranks end with os._exit, which ended the thread in the middle of the file; the lock was released before."""
    save = writes.save

    def slow(*args):
        time.sleep(0.5)
        save(*args)

    def fail():
        raise UserError("a rank is lost")
    monkeypatch.setattr(writes, "save", slow)
    at_steps(monkeypatch, {12: fail})
    assert "a rank is lost" in fails(train.main, toy_run, capsys)
    assert load(tmp_path / "run")["step"] == 10 and not list(tmp_path.glob("run/*.part"))


def test_a_run_that_ended_meanwhile_is_not_replaced(toy_run, tmp_path, trained_once, monkeypatch, capsys):
    """Of two runs that started in a new folder, the second replaced the checkpoint of the first."""
    def wait_for_the_other_run(out_dir, stack):
        shutil.copytree(trained_once, out_dir, dirs_exist_ok=True)
    monkeypatch.setattr(folder, "lock_folder", wait_for_the_other_run)
    for args in ([], ["--init_from=auto"], ["--overwrite=True"]):
        assert "another run has written to" in fails(train.main, [*toy_run, *args], capsys)
        shutil.rmtree(tmp_path / "run")


@pytest.fixture
def trained_once(toy_run, tmp_path):
    train.main(out([*toy_run, *SHORT], tmp_path / "other"))
    return tmp_path / "other"


def test_an_interrupted_sharded_save_is_removed(toy_run, tmp_path):
    """Files of a save that had more ranks were read together with those of the next one."""
    for name in ("sharded_10", "sharded_20"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run/sharded_10/state.json").write_text("{}")
    (tmp_path / "run/sharded_20/shard-00003-model-00001-of-00001.safetensors").write_text("half")
    config = train.TrainConfig(out_dir=str(tmp_path / "run"), init_from="resume", parallel="fsdp")
    meta = type("Data", (), dict(meta={"tokenizer": "byte"}, folder=tmp_path))
    writes.take_over(config, dict(kept=[], best_val_loss=2.0, step=10, settings={}), meta, 0)
    assert [path.name for path in (tmp_path / "run").glob("sharded_*")] == ["sharded_10"]


def test_a_sharded_checkpoint_that_is_half_removed_does_not_count(tmp_path, monkeypatch):
    """A run killed while it removed one had read that one since, not the whole ckpt.pt."""
    (tmp_path / "sharded_10").mkdir()
    (tmp_path / "sharded_10/state.json").write_text("{}")
    assert folder.find_sharded(tmp_path) is not None

    def killed(path, ignore_errors):
        raise KeyboardInterrupt
    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.clear_sharded(tmp_path, rank=0)
    assert (tmp_path / "sharded_10").exists() and folder.find_sharded(tmp_path) is None


def test_the_best_checkpoint_is_the_best_of_those_written(tmp_path, monkeypatch):
    """A loss whose checkpoint could not be written still counted as the lowest: no later one was written as the best."""
    saver = writes.Saver(train.TrainConfig(out_dir=str(tmp_path)), best=None)
    save = writes.save
    for step, loss, room in ((0, 2.0, True), (10, 1.5, False), (20, None, True), (30, 1.6, True), (40, 1.7, True)):
        monkeypatch.setattr(writes, "save", save if room else full)
        saver.save(dict(step=step, val_loss=loss, model={}, optimizer={}))
        saver.wait()
    best, last = (torch.load(tmp_path / name) for name in ("ckpt_best.pt", "ckpt.pt"))
    assert (best["step"], best["best_val_loss"], last["best_val_loss"]) == (30, 1.6, 1.6)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_sharded_run_that_replaces_another_has_not_its_best_checkpoint(tmp_path, monkeypatch, resumed):
    """It stayed beside the new ckpt.pt to the end, and afterwards. It goes once something is saved in its place."""
    init_from = "resume" if resumed else "scratch"
    saver = writes.ShardedSaver(train.TrainConfig(out_dir=str(tmp_path), init_from=init_from))
    monkeypatch.setattr("torch.distributed.checkpoint.save", lambda *args, **kwargs: (tmp_path / "sharded_0").mkdir())
    (tmp_path / "ckpt_best.pt").write_bytes(b"of another run")
    monkeypatch.setattr(writes, "sum_over_ranks", lambda mine: 1.0)
    saver.save(dict(step=0, val_loss=3.0, model={}, optimizer=dict(state={})))
    assert (tmp_path / "ckpt_best.pt").exists(), "nothing could be saved"
    monkeypatch.setattr(writes, "sum_over_ranks", lambda mine: mine)
    saver.save(dict(step=0, val_loss=3.0, model={}, optimizer=dict(state={})))
    assert (tmp_path / "ckpt_best.pt").exists() == resumed


def test_a_save_that_ends_in_any_error_is_not_taken_for_one(tmp_path, monkeypatch, capsys):
    """The thread ended with a traceback, and the run with "done" and exit code 0."""
    def no_memory(*args):
        raise MemoryError("no room for the copy")
    saver = writes.Saver(train.TrainConfig(out_dir=str(tmp_path)))
    monkeypatch.setattr(writes, "save", no_memory)
    saver.save(dict(step=4, val_loss=None, model={}, optimizer={}))
    with pytest.raises(UserError, match="cannot save step 4 .*no room for the copy.*nothing is saved yet"):
        saver.check_written()


@pytest.mark.parametrize("error,words", [
    (OSError(errno.ENOLCK, "No locks available"), "cannot be locked"), (NotImplementedError("no flock"), "choose a --out_dir on a file system"),
    (UserWarning("flock not supported on this filesystem, falling back to SoftFileLock"), "cannot be locked"),
    (PermissionError(errno.EACCES, "Permission denied", "out/.lock"), "(Permission denied): check the path")])
def test_file_systems_without_locks(toy_run, tmp_path, monkeypatch, capsys, error, words):
    def acquire(*args, **kwargs):
        raise error
    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert words in fails(train.main, toy_run, capsys)


@pytest.mark.parametrize("supported", [True, False])
def test_what_auto_means_on_cuda(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: supported)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert runtime.pick_dtype("auto", cuda)[0] == (torch.bfloat16 if supported else torch.float32)
    assert runtime.pick_dtype("auto", cpu)[0] == torch.float32
    assert runtime.pick_compile("auto", cuda, None)[0] and not runtime.pick_compile("auto", cpu, None)[0]


# -- ranks ---------------------------------------------------------------------------------------

def test_fsdp_sums_gradients_in_float32(monkeypatch):
    seen = []
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *args: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, mesh, mp_policy: seen.append(mp_policy))
    config = train.GPTConfig(vocab_size=65, n_layer=2, n_embd=32)
    for dtype in (torch.bfloat16, torch.float32):
        seen.clear()
        where = runtime.Runtime(torch.device("cpu"), dtype, False, "", "")
        distributed.shard(costs.meta_model(train.GPT, config), where, lambda name, shape: None)
        assert len(seen) == 3 and not any(policy.cast_forward_inputs for policy in seen)
        wanted = (torch.bfloat16, torch.float32) if dtype == torch.bfloat16 else (None, None)
        assert {(policy.param_dtype, policy.reduce_dtype) for policy in seen} == {wanted}


def test_ranks_on_machines_that_share_no_disk(monkeypatch):
    """One resumed at its step, the other began: collectives of different steps met."""
    config, meta = train.TrainConfig(), {"sha256": "ab" * 32}
    resume.check_ranks(config, 400, meta)
    others = "ranks find different checkpoints in out:"
    for same, words in (((False,), others), ((True, False), others), ((True, True, False), "machines have different data sets 'python'")):
        answers = iter(same)
        monkeypatch.setattr(resume, "agree", lambda value: next(answers))
        with pytest.raises(UserError, match=words):
            resume.check_ranks(config, 400, meta)


def test_apple_gpus_have_one_rank(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.pick_device("mps", 1, 0)[0].type == "mps"
    with pytest.raises(UserError, match="several ranks cannot share tensors of an Apple GPU"):
        runtime.pick_device("mps", 2, 0)


def test_one_gpu_is_not_for_several_ranks(monkeypatch):
    """--device=cuda:1 was ignored under torchrun."""
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    assert [str(runtime.pick_device(*args)[0]) for args in (("cuda", 2, 1), ("cuda:1", 1, 0), ("cuda:0", 1, 0))] == [
        "cuda:1", "cuda:1", "cuda:0"]
    with pytest.raises(UserError, match="device=cuda:1 names one GPU for all 2 ranks"):
        runtime.pick_device("cuda:1", 2, 0)
    with pytest.raises(UserError, match="there is no GPU 2, this machine has 2: choose another, such as --device=cpu"):
        runtime.pick_device("cuda:2", 1, 0)


def test_each_rank_of_a_machine_needs_memory(monkeypatch):
    """Eight ranks on one machine were each told that there is enough."""
    config = train.TrainConfig(device="cpu", n_layer=2, n_embd=64, vocab_size=100)
    floor = sum(costs.training_floor(config, costs.count_params(train.GPT, config), 2048, 8, 9).values())
    monkeypatch.setattr(runtime, "machine_memory", lambda: 2 * floor)
    config.max_steps = 9
    runtime.check_training(train.GPT, config, 8, 8, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="this needs at least"):
        runtime.check_training(train.GPT, config, 8, 8, 0)


def test_a_failed_compilation_is_one_sentence(toy_run, monkeypatch, capsys):
    """Blocks of --parallel=fsdp are compiled in the first step, behind the fallback to eager mode."""
    from torch._inductor.exc import InductorError

    def fail(*args):
        raise InductorError(RuntimeError("no compiler"), None)
    monkeypatch.setattr(train, "backward", fail)
    assert "torch.compile does not work here (RuntimeError: no compiler): add --compile=False" in fails(train.main, toy_run, capsys)


def test_an_evaluation_alone_trains_nothing(toy_run, tmp_path, monkeypatch, capsys):
    """--eval_only read the moments, compiled, and ran a training step, for which a device may have no memory."""
    train.main([*toy_run, *SHORT])
    done = re.search(r"done in .*: (val_loss .*)", capsys.readouterr().out)[1]
    for module, name in ((train, "backward"), (torch, "compile"), (checkpoint, "load_moments")):
        monkeypatch.setattr(module, name, None)
    train.main([*toy_run, "--init_from=resume", "--eval_only=True", "--compile=True"])
    said = capsys.readouterr().out
    assert done in said and "eager" in said


def test_a_failed_part_is_forgotten_once_rank_0_has_saved_all(tmp_path, monkeypatch):
    """Ranks other than 0 ended a finished run with an error, since a save before the last one had failed."""
    saver = writes.ShardedSaver(train.TrainConfig(out_dir=str(tmp_path)), rank=1)
    saver.failed = "another rank cannot save its part"
    saver.save(dict(step=9, val_loss=1.0, model={}, optimizer={}), last=True)
    assert saver.failed is None


def test_lost_ranks_are_no_damage(monkeypatch):
    """While a sharded checkpoint is read, too: the remedy was to replace the run."""
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert not distributed.lost(error)
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    assert distributed.lost(error) and distributed.lost(torch.distributed.DistNetworkError("x"))
    assert not distributed.lost(RuntimeError("mismatch sizes"))
