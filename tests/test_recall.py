"""data/recall, and data sets whose loss counts answers alone."""
import contextlib
import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load
from test_compare import train_here
from test_inputs import fails, program
from test_train import out, rows, torchrun

import compare
import sample
import train
from model import GPT, GPTConfig, HeadLoss
from nanogqa.batches import Batches
from nanogqa.dataloader import Dataset, train_batch, val_batch
from nanogqa.runtime import pick_runtime
from nanogqa.writer import write_dataset

prepare = program("recall")
SMALL = ["--fields=3", "--records=4", "--length=64", "--train=60", "--val=9"]


def prepared(folder, *args):
    """Prepares a small data set in folder; the folder as text."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare([*SMALL, f"--data_dir={folder}", *args])
    return str(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("recall"))


@pytest.fixture
def run(questions, tmp_path):
    """Arguments of a training run that takes a second."""
    return [f"--dataset={questions}", f"--out_dir={tmp_path / 'run'}", "--device=cpu",
            "--n_layer=1", "--n_head=4", "--n_embd=32", "--block_size=64", "--batch_size=2",
            "--tokens_per_step=512", "--max_steps=4", "--eval_interval=2", "--eval_tokens=None",
            "--log_interval=1", "--warmup_steps=2"]


def sequences_of(folder, split, length=64):
    ids = np.fromfile(Path(folder) / f"{split}.bin", dtype="<u2").astype(np.int64)
    return ids.reshape(-1, length)


def solve(ids, fields):
    """The answers of a sequence by where they are, {place: id}. It knows of the generator only that
    ids 0, 1 and 2 end the text, end a record and begin a question, and that relations are all pairs
    of fields in order."""
    ids = ids.tolist()
    pairs = list(itertools.permutations(range(fields), 2))
    records, rest = [], ids
    while 1 in rest:
        end = rest.index(1)
        records.append(rest[:end])
        rest = rest[end + 1:]
    answers = {}
    for place in range(len(ids) - len(rest), len(ids) - 3, 4):
        sign, relation, value, _ = ids[place:place + 4]
        if sign == 0:
            break
        assert sign == 2
        asked, wanted = pairs[relation - 3]
        [record] = [record for record in records if record[asked] == value]
        answers[place + 3] = record[wanted]
    return answers


# -- the generator ---------------------------------------------------------------------------------

@pytest.mark.parametrize("fields,records,length", [(1, 8, 64), (2, 5, 64), (3, 4, 64), (4, 8, 130)])
def test_an_independent_solver_answers_every_question(tmp_path, fields, records, length):
    folder = prepared(tmp_path, f"--fields={fields}", f"--records={records}", f"--length={length}")
    width = max(2, fields)
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    relations = 1 if fields == 1 else fields * (fields - 1)
    assert meta["vocab_size"] == 3 + relations + 64 * width
    for split, count in (("train", 60), ("val", 9)):
        sequences = sequences_of(folder, split, length)
        assert len(sequences) == count
        sizes = set()
        for ids in sequences:
            answers = solve(ids, width)
            assert {place: ids[place] for place in answers} == answers
            assert set(np.flatnonzero(ids == 2) + 3) == set(answers)
            n = int((ids == 1).sum())
            possible = n * relations
            assert len(answers) == min(possible, (length - 1 - n * (width + 1)) // 4) > 0
            asked = {tuple(ids[place - 2:place]) for place in answers}
            assert len(asked) == len(answers), "no question is asked twice"
            table = ids[:n * (width + 1)].reshape(n, width + 1)[:, :-1]
            assert len(set(table.flatten().tolist())) == n * width
            kinds = (table - 3 - relations) // 64
            assert (kinds == np.arange(width)).all(), "fields have vocabularies of their own"
            assert ids[-1] == 0
            sizes.add(n)
        if split == "val":
            assert sizes == {records}
        else:
            assert max(sizes) == records and min(sizes) == 2 and len(sizes) > 1


def test_a_gap_parts_records_and_questions(tmp_path):
    """The records of a sequence stay the same, and its questions come later."""
    without = sequences_of(prepared(tmp_path / "near", "--fields=1"), "train")
    apart = sequences_of(prepared(tmp_path / "far", "--fields=1", "--gap=20"), "train")
    for near, ids in zip(without, apart, strict=True):
        end = int(np.flatnonzero(ids == 1)[-1]) + 1
        assert np.array_equal(ids[:end], near[:end]) and not ids[end:end + 20].any()
        later = [*ids[:end], *ids[end + 20:]]
        assert later == near[:len(later)].tolist()
        answers = solve(np.array(later), 2)
        assert answers and {place: later[place] for place in answers} == answers
        assert ids[end + 20] == 2 and min(answers) == end + 3


def test_the_seed_alone_decides(questions, tmp_path, capsys):
    assert (Path(prepared(tmp_path / "same")) / "meta.json").read_bytes() == (
        Path(questions) / "meta.json").read_bytes()
    other = prepared(tmp_path / "other", "--seed=2")
    for split in ("train", "val"):
        assert not np.array_equal(sequences_of(other, split), sequences_of(questions, split))
    more = prepared(tmp_path / "more", "--train=80")
    assert np.array_equal(sequences_of(more, "train")[:60], sequences_of(questions, "train"))
    prepare([*SMALL, f"--data_dir={other}", "--seed=2"])
    assert "already holds this data set" in capsys.readouterr().out
    before = (Path(other) / "meta.json").read_bytes()
    assert "other settings" in fails(prepare, [*SMALL, f"--data_dir={other}"], capsys)
    assert (Path(other) / "meta.json").read_bytes() == before


@pytest.mark.parametrize("args,words", [
    (["--length=20"], "has no room for 4 records, the gap and a question: it must be at least 21"),
    (["--records=65", "--length=999"], "records must be at most 64"),
    (["--gap=44"], "length=64 has no room for 4 records, the gap and a question: it must be at least 65"),
    (["--gap=-1"], "gap must be at least 0"),
    (["--fields=0"], "fields must be at least 1"),
    (["--train=1"], "train must be at least 2"),
])
def test_bad_settings_of_the_generator(tmp_path, capsys, args, words):
    assert words in fails(prepare, [*SMALL, f"--data_dir={tmp_path / 'new'}", *args], capsys)
    assert not (tmp_path / "new").exists()


# -- the loss counts answers alone -----------------------------------------------------------------

def solver(width, wrong=()):
    """A stand-in for GPT that gives the solver's answers to questions, except to those whose place
    in the sequence is in wrong, and a wrong token everywhere else."""
    def forward(x, y, logits):
        vocab_size = int(x.max()) + 2
        guess = torch.full_like(x, vocab_size - 1)  # an id that the data does not have
        for row, ids in enumerate(x):
            for place, answer in solve(ids, width).items():
                guess[row, place - 1] = answer
            for place in wrong:
                guess[row, place - 1] = vocab_size - 1
        n_targets = (y >= 0).sum().clamp(min=1)
        rows = 100.0 * torch.nn.functional.one_hot(guess, vocab_size).float()
        assert logits == "targets"
        return rows[y >= 0], HeadLoss()(rows, torch.eye(vocab_size), y, n_targets)
    forward.eval = forward.train = lambda: None
    return forward


def evaluated(questions, forward, **changes):
    config = train.TrainConfig(**{**dict(block_size=64, vocab_size=201, tokens_per_step=128,
                                         batch_size=2, eval_tokens=None), **changes})
    runtime = pick_runtime("cpu", "float32", False)
    return train.evaluate(forward, Batches(Dataset(questions), config, runtime), runtime)


def test_right_answers_alone_have_loss_0_and_accuracy_1(questions):
    assert evaluated(questions, solver(3)) == {"val_loss": 0.0, "val_acc": 1.0}
    # 9 sequences of 16 tokens of records and 11 questions: the first answer is at 19
    metrics = evaluated(questions, solver(3, wrong=[19, 23]))
    assert metrics["val_acc"] == 81 / 99 and metrics["val_loss"] == pytest.approx(200 / 11)


@pytest.mark.parametrize("block_size", [64, 128])
def test_windows_begin_with_a_sequence_and_targets_are_answers(questions, block_size):
    dataset = Dataset(questions)
    n = block_size // 64
    whole = {sequence.tobytes() for sequence in sequences_of(questions, "train")}
    x, y = train_batch(dataset.train, seed=3, first=0, count=100, block_size=block_size)
    seen = {part.tobytes() for row in x for part in row.reshape(n, 64)}
    assert seen <= whole and len(seen) >= 58, "several epochs, each of them without an offset"
    for inputs, targets in zip(x.reshape(-1, 64), y.reshape(-1, 64), strict=True):
        wanted = np.full(64, -1)
        for place, answer in solve(inputs, 3).items():
            wanted[place - 1] = answer
        assert np.array_equal(targets, wanted)
    x, y = val_batch(dataset.val, [0, 8 * 64], 2, 64)
    assert all(np.flatnonzero(row >= 0)[0] == 18 for row in y)


def test_every_block_that_fits_is_trained_on(tmp_path):
    """Seven sequences are three blocks of two; the third was left out, as if blocks began at an offset."""
    documents = [("train", f"{a}+{a}={2 * a}") for a in range(5)] + [("train", "1+2=3"), ("train", "1+3=4"), ("val", "2+1=3")]
    with contextlib.redirect_stdout(io.StringIO()):
        write_dataset([*documents, ("val", "2+2=4")], tmp_path / "sums", "byte", sequence_length=6)
    x, _ = train_batch(Dataset(str(tmp_path / "sums")).train, seed=3, first=0, count=3, block_size=12)
    texts = {bytes(ids.tolist()) for ids in (row[:5] for row in x)}
    assert texts == {b"0+0=0", b"2+2=4", b"4+4=8"}


def test_a_batch_without_an_answer_has_loss_0_and_no_gradient(questions):
    config = GPTConfig(block_size=64, vocab_size=201, n_layer=1, n_embd=32)
    runtime = pick_runtime("cpu", "float32", False)
    ids = np.ones((2, 64), dtype=np.int64)
    empty = SimpleNamespace(x=ids, y=np.full_like(ids, -1), seeds=None)
    for fast in (False, True):
        model = GPT(config)
        if fast:
            train.accelerate(model)
        assert train.backward(model, [empty], runtime) == 0
        assert all(not p.grad.any() for p in model.parameters())
        assert not any(p.isnan().any() for p in model.parameters())
        logits, loss = model(torch.ones(2, 64, dtype=torch.long),
                             torch.full((2, 64), -1), logits="targets")
        assert logits.shape == (0, 201) and loss == 0
        train.update(model, [], 1.0)


# -- runs ------------------------------------------------------------------------------------------

def test_a_run_logs_the_accuracy_and_resumes(run, questions, tmp_path, capsys):
    train.main(run)
    text = capsys.readouterr().out
    assert "the loss counts answers alone: tokens 3 after id 2" in text
    log = rows(tmp_path / "run")
    assert [row["val_acc"] is not None for row in log] == [True, False, True, False, True]
    assert "val_bpb" not in log[0] and f"val_acc {log[-1]['val_acc']:.4f}" in text
    assert log[0]["train_loss"] is None and all(4 < row["train_loss"] < 7 for row in log[1:])
    # by hand, from the checkpoint
    model = GPT(GPTConfig(**load(tmp_path / "run")["config"]))
    model.load_state_dict(load(tmp_path / "run")["model"])
    right = total = loss = 0
    for ids in sequences_of(questions, "val"):
        logits = model(torch.from_numpy(ids)[None])[0][0].log_softmax(-1)
        for place, answer in solve(ids, 3).items():
            right += int(logits[place - 1].argmax()) == answer
            loss -= logits[place - 1, answer].item()
            total += 1
    assert total == 9 * 11 and log[-1]["val_acc"] == right / total
    assert log[-1]["val_loss"] == pytest.approx(loss / total, abs=1e-5)

    train.main([*run, "--init_from=resume", "--eval_only=True"])
    assert f"val_acc {right / total:.4f}" in capsys.readouterr().out
    train.main([*run, "--init_from=resume"])  # has ended
    assert re.search(rf"done in .*: val_loss {log[-1]['val_loss']:.4f}\n", capsys.readouterr().out)
    train.main([*out(run, tmp_path / "parts"), "--max_steps=2", "--schedule=wsd", "--cooldown=0"])
    train.main([*out(run, tmp_path / "parts"), "--init_from=resume"])
    train.main([*out(run, tmp_path / "whole"), "--schedule=wsd", "--cooldown=0"])
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for a, b in zip(whole[2:], parts[2:], strict=True):
        for key in ("step", "train_loss", "val_loss", "val_acc", "grad_norm", "lr"):
            assert a[key] == b[key]
    assert "its ids stand for no text" in fails(
        sample.main, [f"--out_dir={tmp_path / 'run'}", "--device=cpu"], capsys)


def sums(folder, **about):
    """A data set of sums in bytes, such as 2+4=6 and 4+2>6: 15 of 25 have an answer. Its folder."""
    documents = []
    for split in ("val", "train"):
        for a, b in itertools.product(range(5), repeat=2):
            sign = "=>"[a > b]
            documents.append((split, f"{a}+{b}{sign}{a + b}"))
    with contextlib.redirect_stdout(io.StringIO()):
        write_dataset(documents, folder, "byte", **about)
    return folder


SUMS = ["--device=cpu", "--n_layer=1", "--n_head=1", "--n_embd=32", "--block_size=12",
        "--tokens_per_step=48", "--eval_interval=5"]


def test_two_ranks_make_the_same_losses_and_count_the_same_answers(tmp_path):
    """Micro-batches and ranks have different numbers of answers: a mean of means would differ."""
    data = sums(tmp_path / "sums", answer_after=ord("="), sequence_length=6)
    args = [f"--dataset={data}", *SUMS, "--batch_size=2", "--max_steps=40", "--log_interval=5",
            "--learning_rate=1e-2", "--warmup_steps=5"]
    train.main(out(args, tmp_path / "one"))
    process = torchrun(out(args, tmp_path / "two"), 2, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    accuracies = set()
    for a, b in zip(one, two, strict=True):
        assert a["val_acc"] == b["val_acc"]
        accuracies.add(a["val_acc"])
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-4)
    assert len(accuracies) > 2
    assert all(a * 15 == pytest.approx(round(a * 15)) for a in accuracies)


@pytest.mark.parametrize("args,words", [
    (["--block_size=32"], "block_size=32 is not a multiple of 64, the length of the sequences"),
    (["--vocab_size=100"], "has 201 token ids"),
])
def test_settings_that_do_not_fit(run, tmp_path, capsys, args, words):
    assert words in fails(train.main, [*run, *args], capsys)
    assert not (tmp_path / "run").exists()


def edit(folder, **changes):
    path = Path(folder) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


@pytest.mark.parametrize("changes,words", [
    (dict(answer_after=201), "answer_after is outside the vocabulary"),
    (dict(answer_after=True), "which is not a count"),
    (dict(sequence_length=0), "which is not a positive"),
    (dict(answer_distance=0), "which is not a positive"),
    (dict(answer_distance=10**9), "has no answer, 1000000000 after id 2,"),
])
def test_a_wrong_meta_is_refused(run, questions, tmp_path, capsys, changes, words):
    folder = shutil.copytree(questions, tmp_path / "data")
    edit(folder, **changes)
    assert words in fails(train.main, [*run, f"--dataset={folder}"], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [
    dict(answer_after=1), dict(answer_distance=2), dict(sequence_length=32)])
def test_a_resumed_run_has_the_same_targets(run, questions, tmp_path, capsys, changes):
    folder = shutil.copytree(questions, tmp_path / "data")
    args = [*run, f"--dataset={folder}", "--max_steps=2"]
    train.main(args)
    edit(folder, **changes)
    assert "meta.json is damaged" in fails(train.main, [*args, "--init_from=resume"], capsys)


def test_any_text_can_have_answers(tmp_path, capsys):
    """As docs/data.md says: the answer is the byte after the equals sign."""
    sums(tmp_path / "sums", answer_after=ord("="), sequence_length=6)
    x, y = val_batch(Dataset(tmp_path / "sums").val, [0, 6 * 7], 2, 6)
    assert y[:, 3].tolist() == [ord("0"), ord("3")] and (y >= 0).sum() == 2
    assert bytes(x[1, :5].tolist()) == b"1+2=3"
    args = [f"--out_dir={tmp_path / 'run'}", *SUMS, "--max_steps=1"]
    train.main([f"--dataset={tmp_path / 'sums'}", *args])
    assert "val_acc 0." in capsys.readouterr().out
    none = sums(tmp_path / "none", answer_after=ord("?"))
    assert "has no answer, 1 after id 63," in fails(
        train.main, [f"--dataset={none}", *args, "--overwrite=True"], capsys)
    sums(tmp_path / "plain")
    plain = Dataset(tmp_path / "plain").meta["sha256"]
    assert plain != Dataset(tmp_path / "sums").meta["sha256"], "it tells the targets apart"


def test_compare_reports_the_accuracy(questions, tmp_path, monkeypatch):
    timing = dict(step_ms=1.0, tok_s=1.0, peak_memory_bytes=1, batch_size=1, prompt_len=8,
                  prefill_s=1.0, mbu=None, bytes_per_step=1, kv_cache_bytes=1)
    monkeypatch.setattr(compare, "run_bench", lambda plan: [timing])
    monkeypatch.setattr("nanogqa.runs.run_training", train_here)
    compare.main([f"--dataset={questions}", f"--out_dir={tmp_path}", "--device=cpu", "--seeds=2",
                  "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--match=shape",
                  "--tokens_per_step=128", "--max_steps=2", "--eval_interval=1",
                  "--warmup_steps=1", "--decode_batch_size=1", "--decode_prompt_len=8"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| validation loss | right answers |" in text and "bits per byte" not in text
    assert "nats per answer" in text and "ublished" not in text
    records = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["records"]
    accuracies = [record["metrics"]["val_acc"] for record in records]
    assert len(records) == 4 and f"| {sum(accuracies[:2]) / 2:.4f} ± " in text
    with contextlib.suppress(ImportError):
        import matplotlib  # noqa: F401
        assert (tmp_path / "metrics.png").exists() and "![metrics](metrics.png)" in text
    compare.main([f"--out_dir={tmp_path}", "--report_only=True"])
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
