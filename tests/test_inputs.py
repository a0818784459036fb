"""Bad input: one sentence that names cause and remedy, exit code 2, nothing overwritten."""
import ast
import hashlib
import json
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from conftest import load

import sample
import train
from nanogqa import checkpoint, dataloader, resume
from nanogqa.batches import batch_shape
from nanogqa.configurator import UserError, literal, parse
from nanogqa.prompts import read_prompts
from nanogqa.writer import open_tokenizer, write_dataset
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def program(name):
    """The main of data/NAME/prepare.py."""
    spec = spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def fails(main, args, capsys):
    """Runs main(args), which must exit with 2 after one sentence; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(args)
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and error and "\n" not in error and "Traceback" not in error, error
    return error


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory):
    """A finished run of the toy data; read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main([f"--dataset={toy_data}", f"--out_dir={folder}", "--device=cpu", "--n_layer=1", "--n_head=4", "--n_kv_head=2",
                "--n_embd=32", "--block_size=32", "--batch_size=4", "--tokens_per_step=128", "--max_steps=2", "--eval_tokens=64"])
    return folder


@pytest.mark.parametrize("args,words", [
    (["--n_kv_heads=2"], "unknown setting 'n_kv_heads', did you mean n_kv_head?"),
    (["--qqqq=2"], "--help lists them"),
    (["--n_layer"], "--n_layer needs a value: write --n_layer=VALUE"),
    (["--n_layer=two"], "n_layer must be a whole number, not 'two'"),
    (["--n_layer=2.5"], "n_layer must be a whole number, not '2.5'"),
    (["--learning_rate=fast"], "learning_rate must be a number, not 'fast'"),
    (["--learning_rate=nan"], "learning_rate must be a number"),
    (["--qk_norm=maybe"], "qk_norm must be True or False, not 'maybe'"),
    (["--dtype=float16"], "dtype must be auto or float32 or bfloat16, not 'float16'"),
    (["--optimizer=sgd"], "optimizer must be adamw"),
    (["--compile=yes"], "compile must be auto or True or False"),
    (["config/none.py"], "cannot read config/none.py"),
    (["--n_kv_head=3"], "n_kv_head=3 does not divide n_head=4: choose one of [1, 2, 4]"),
    (["--n_embd=30"], "n_embd=30 is not a multiple of n_head=4"),
    (["--n_layer=0"], "n_layer must be at least 1"),
    (["--max_steps=-1"], "max_steps must be at least 0"),
    (["--beta1=1"], "beta1 must be below 1"),
    (["--tokens_per_step=100"], "not a multiple of block_size=32: the nearest is 96 or 128"),
    (["--tokens_per_step=160"], "batch_size 4 x 1 ranks x block_size 32 = 128: the nearest is 128 or 256, or choose another batch_size"),
    (["--block_size=100000", "--tokens_per_step=100000", "--batch_size=1"], "block_size=100000 needs 100001 tokens in each split"),
    (["--vocab_size=200"], "has 257 token ids, more than vocab_size=200"),
    (["--device=tpu"], "unknown device 'tpu': choose auto, cpu, cuda"),
    (["--device=cuda:99"], "--device=cpu"),
    (["--dataset=none"], "there is no data set 'none': choose one of hub, python, recall, shakespeare, text"),
    (["--init_from=resume"], "there is no checkpoint"),
    (["--init_from=nowhere"], "init_from=nowhere does not exist: choose scratch, resume or auto"),
    (["--eval_only=True"], "eval_only needs weights"),
    (["--eval_tokens=0"], "eval_tokens must be at least 1"),
    (["--trainable=("], "trainable='(' is not a regular expression"),
    (["--rope_factor=2"], "rope_factor needs rope_original_block_size"), (["--rope_factor=0.5"], "rope_factor must be at least 1"),
])
def test_bad_settings_of_train(toy_run, tmp_path, capsys, args, words):
    assert words in fails(train.main, [*toy_run, *args], capsys)
    assert not (tmp_path / "run").exists()


def test_a_batch_size_that_nobody_gave_is_not_named():
    config = TrainConfig(tokens_per_step=160, block_size=32)
    with pytest.raises(UserError, match=r"not a multiple of 3 ranks x block_size 32 = 96: the nearest is 96 or 192$"):
        batch_shape(config, 3)
    assert batch_shape(config, 5) == (1, 1)


def test_too_little_memory_for_a_checkpoint_is_not_damage(trained, capsys, monkeypatch):
    def meta_model(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    monkeypatch.setattr(checkpoint, "meta_model", meta_model)
    assert "there is not enough memory" in fails(sample.main, [f"--out_dir={trained}", "--device=cpu"], capsys)


def test_arithmetic_in_config_files():
    """A base above 1,000 was refused as too large."""
    for text, value in (("1024**2", 2**20), ("2**20", 2**20), ("1e6**0.5", 1e3), ("3 * 2**4 - 1", 47)):
        assert literal(ast.parse(text, mode="eval").body) == value
    for text in ("9**9**9", "2**63", "2**1001", "1e300**1000", "(-8)**0.5"):
        with pytest.raises((ValueError, OverflowError)):
            literal(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("text,words", [
    ("n_layer = __import__('os').system('true')", "must be a literal or constant arithmetic"),
    ("import os", "only assignments like n_kv_head = 2 are read"),
    ("n_layer = n_head", "must be a literal"),
    ("n_layer = 9**9**9", "too large"),
    ("n_layer = 1 / 0", "must be a literal"),
    ("n_layer = 'four'", "n_layer must be a whole number"),
    ("n_layer = True", "n_layer must be a whole number"),
    ("n_layer = [1", "is not a config file"),
    ("nlayer = 1", "did you mean n_layer?"),
    ("(" * 5000, "is not a config file"),
    ("\0", "is not a config file"),
])
def test_bad_config_files(toy_run, tmp_path, capsys, text, words):
    path = tmp_path / "bad.py"
    path.write_text(text)
    error = fails(train.main, [*toy_run, str(path)], capsys)
    assert words in error and "bad.py" in error


def test_config_files_are_read_as_data(tmp_path):
    path = tmp_path / "good.py"
    path.write_text('"""doc"""\nn_layer = 2**3 - 1  # why\nlearning_rate = 1\nmin_lr = -(-3e-4)\nn_kv_head = None\n'
                    'out_dir = "{out_dir}/x"\ncompile = False\nwandb_run_name = "a=b"\n')
    got = parse(TrainConfig, ["--out_dir=base", str(path), "--n_layer=3", "--wandb_project=p=q"], "")
    assert got == dict(out_dir="base/x", n_layer=3, learning_rate=1.0, min_lr=3e-4, n_kv_head=None, compile=False,
                       wandb_run_name="a=b", wandb_project="p=q")
    assert isinstance(got["learning_rate"], float) and got["compile"] is False
    for flag in ("--compile=true", "--fast=true", "--compile=True"):
        assert list(parse(TrainConfig, [flag], "").values()) == [True]


def damage(folder, kind):
    """Breaks one thing about the data set or checkpoint in folder."""
    train_bin, meta, ckpt = folder / "train.bin", folder / "meta.json", folder / "ckpt.pt"
    if kind == "no meta":
        meta.unlink()
    elif kind == "no train.bin":
        train_bin.unlink()
    elif kind == "truncated":
        train_bin.write_bytes(train_bin.read_bytes()[:-10])
    elif kind == "ids":
        train_bin.write_bytes(train_bin.read_bytes()[:-2] + b"\xff\xff")
    elif kind in ("not json", "not a meta"):
        meta.write_text("{" if kind == "not json" else "[]")
    elif kind == "escape":
        meta.write_text(meta.read_text(encoding="utf-8").replace("train.bin", "../train.bin"))
    elif kind == "empty":
        ckpt.write_bytes(b"")
    elif kind == "cut":
        ckpt.write_bytes(ckpt.read_bytes()[:-1000])
    elif kind == "noise":
        ckpt.write_bytes(b"\x80\x04noise")
    elif kind == "foreign":
        torch.save({"model_args": {"n_layer": 1}, "model": {}}, ckpt)
    elif kind == "other weights":
        state = torch.load(ckpt)
        state["config"]["n_embd"] = 64
        torch.save(state, ckpt)


@pytest.mark.parametrize("kind,words", [
    ("no meta", "is not prepared"), ("no train.bin", "train.bin is missing"), ("truncated", "bytes where meta.json promises"),
    ("ids", "holds token id 65535, but its vocabulary ends at 256"), ("not json", "is not the meta.json of a data set"),
    ("not a meta", "is not the meta.json of a data set"), ("escape", "is not the meta.json of a data set")])
def test_damaged_data(toy_data, toy_run, tmp_path, capsys, kind, words):
    folder = tmp_path / "data"
    shutil.copytree(toy_data, folder)
    damage(folder, kind)
    error = fails(train.main, [*toy_run, f"--dataset={folder}"], capsys)
    assert words in error and "prepare.py" in error
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_is_not_prepared_names_its_command(toy_run, tmp_path, capsys, monkeypatch):
    from nanogqa import dataloader
    (tmp_path / "data/shakespeare").mkdir(parents=True)
    (tmp_path / "data/shakespeare/prepare.py").touch()
    monkeypatch.setattr(dataloader, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    error = fails(train.main, [*toy_run, "--dataset=shakespeare"], capsys)
    assert "data set 'shakespeare' is not prepared: run python data/shakespeare/prepare.py" in error


@pytest.mark.parametrize("kind,words", [
    ("empty", "damaged or not a checkpoint"), ("cut", "damaged or not a checkpoint"), ("noise", "damaged or not a checkpoint"),
    ("foreign", "is not a checkpoint of this program"), ("other weights", "do not fit")])
@pytest.mark.parametrize("who", ["resume", "weights", "sample"])
def test_damaged_checkpoints(trained, tmp_path, toy_data, capsys, kind, words, who):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    damage(folder, kind)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    main, args = {"resume": (train.main, [f"--out_dir={folder}", "--init_from=resume"]),
                  "weights": (train.main, [f"--out_dir={tmp_path / 'new'}", f"--init_from={folder}", f"--dataset={toy_data}"]),
                  "sample": (sample.main, [f"--out_dir={folder}"])}[who]
    assert words in fails(main, [*args, "--device=cpu"], capsys)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("args,words", [
    ([], "holds a checkpoint: continue it with --init_from=resume, replace it with --overwrite=True"),
    (["--init_from=resume", "--seed=2"], "seed=2, but the run in"),
    (["--init_from=resume", "--tokens_per_step=256"], "tokens_per_step=256, but the run in"),
    (["--init_from=resume", "--n_kv_head=1"], "n_kv_head=1, but the model in"),
    (["--init_from=resume", "--n_layer=2"], "n_layer=2, but the model in"),
    (["--init_from=resume", "--block_size=64"], "block_size=64, but the model in"),
    (["--init_from=resume", "--dropout=0.1"], "dropout=0.1, but the model in"),
    (["--init_from=resume", "--max_steps=1"], "is at step 2, beyond max_steps=1"),
])
def test_a_finished_run_is_not_overwritten(trained, toy_data, capsys, args, words):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    base = [f"--out_dir={trained}", f"--dataset={toy_data}", "--device=cpu"]
    assert words in fails(train.main, [*base, *args], capsys)
    assert before == {path.name: path.read_bytes() for path in trained.iterdir()}


@pytest.mark.parametrize("args", [[], ["--init_from=auto"], ["--max_steps=1"]])
def test_a_best_checkpoint_without_the_newest_is_not_replaced(toy_run, tmp_path, capsys, args):
    """ckpt.pt may be deleted to save room on the disk. A new run then replaced ckpt_best.pt and metrics.jsonl."""
    train.main([*toy_run, "--max_steps=2"])
    (tmp_path / "run/ckpt.pt").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    words = "run holds ckpt_best.pt, but no ckpt.pt: copy it to ckpt.pt to continue, replace it with --overwrite=True"
    assert words in fails(train.main, [*toy_run, *args], capsys)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    shutil.copy(tmp_path / "run/ckpt_best.pt", tmp_path / "run/ckpt.pt")
    train.main([*toy_run, "--max_steps=4", "--init_from=auto"])
    assert load(tmp_path / "run")["step"] == 4


def test_a_run_killed_at_its_first_checkpoint_begins_again(toy_run, tmp_path, monkeypatch):
    """ckpt_best.pt gets its name before ckpt.pt does, whose content is then in ckpt.pt.part."""
    train.main([*toy_run, "--max_steps=2"])
    (tmp_path / "run/ckpt.pt").rename(tmp_path / "run/ckpt.pt.part")
    with monkeypatch.context() as patched:  # it is stopped once more before it saves
        patched.setattr(train, "make_model", lambda *args: sys.exit(1))
        with pytest.raises(SystemExit):
            train.main([*toy_run, "--max_steps=3", "--init_from=auto"])
    train.main([*toy_run, "--max_steps=3", "--init_from=auto"])
    assert load(tmp_path / "run")["step"] == 3


def test_the_learning_rate_may_not_rise_at_the_end(toy_run, tmp_path, capsys):
    """A config's min_lr stays where a flag lowers learning_rate."""
    error = fails(train.main, [*toy_run, "--learning_rate=1e-5", "--min_lr=6e-5"], capsys)
    assert "min_lr=6e-05 is above learning_rate=1e-05, so that the rate would rise: lower min_lr too" in error
    assert not (tmp_path / "run").exists()


def test_a_prepared_folder_comes_before_a_script(toy_data, tmp_path, monkeypatch):
    """data/text holds its prepare.py alone, and --dataset=text meant that, whatever ./text holds."""
    shutil.copytree(toy_data, tmp_path / "text")
    (tmp_path / "scripts/text").mkdir(parents=True)
    monkeypatch.setattr(dataloader, "DATA", tmp_path / "scripts")
    monkeypatch.chdir(tmp_path)
    assert dataloader.folder_of("text") == Path("text")
    (tmp_path / "scripts/text/meta.json").write_text("{}")
    assert dataloader.folder_of("text") == tmp_path / "scripts/text"


def test_windows_is_one_sentence(monkeypatch, capsys):
    """It was an AttributeError of signal or os."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert "use WSL 2, or Linux or macOS" in fails(train.main, ["--max_steps=1"], capsys)


def test_overwrite_replaces_the_run(toy_run, tmp_path, capsys):
    train.main([*toy_run, "--max_steps=5"])
    fails(train.main, [*toy_run, "--max_steps=3"], capsys)
    train.main([*toy_run, "--max_steps=3", "--overwrite=True"])
    assert load(tmp_path / "run")["step"] == 3
    assert len((tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_another_data_set_or_tokenizer(trained, toy_data, tmp_path, capsys):
    write_dataset([("train", "other text " * 50), ("val", "more of it " * 50)], tmp_path / "other", "byte")
    error = fails(train.main, [f"--out_dir={trained}", "--init_from=resume", f"--dataset={tmp_path / 'other'}"], capsys)
    assert "is not the one that the run in" in error
    meta = json.loads((tmp_path / "other/meta.json").read_text(encoding="utf-8"))
    (tmp_path / "other/meta.json").write_text(json.dumps(dict(meta, tokenizer="gpt2")))
    for how in ("resume", str(trained)):
        folder = trained if how == "resume" else tmp_path / "new"
        error = fails(train.main, [f"--out_dir={folder}", f"--init_from={how}", f"--dataset={tmp_path / 'other'}"], capsys)
        assert "has tokenizer 'gpt2'" in error and "--tokenizer=byte" in error


def test_an_out_dir_that_cannot_be_written(toy_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    error = fails(train.main, [*toy_run, f"--out_dir={tmp_path / 'file' / 'run'}"], capsys)
    assert "cannot write to" in error and "choose another --out_dir" in error


@pytest.mark.parametrize("args,words", [
    (["--temperature=-1"], "temperature must be at least 0"), (["--top_k=-1"], "top_k must be at least 0"),
    (["--top_p=1.5"], "top_p must be at most 1"), (["--num_samples=0"], "num_samples must be at least 1"),
    (["--max_new_tokens=-5"], "max_new_tokens must be at least 0"), (["--prompt=FILE:/no/such"], "cannot read the prompt /no/such"),
    (["--out_dir=/no/run"], "there is no checkpoint /no/run/ckpt.pt: train one"), (["--device=abc"], "unknown device 'abc'"),
    (["--temprature=1"], "did you mean temperature?"), (["--prompts=/no/such"], "cannot read the prompt /no/such"),
    (["--output=html"], "output must be text or jsonl")])
def test_bad_settings_of_sample(trained, capsys, args, words):
    assert words in fails(sample.main, [f"--out_dir={trained}", *args], capsys)


@pytest.mark.parametrize("text,words", [("", "holds no prompts"), ("{}\n", "prompts.jsonl:1 is not a JSON string"),
                                        ('"a"\n[1]\n', "prompts.jsonl:2 is not a JSON string"), ("nope\n", "is not a JSON string")])
def test_bad_files_of_prompts(trained, tmp_path, capsys, text, words):
    (tmp_path / "prompts.jsonl").write_text(text)
    assert words in fails(sample.main, [f"--out_dir={trained}", f"--prompts={tmp_path / 'prompts.jsonl'}"], capsys)


@pytest.mark.parametrize("name,args,words", [
    ("python", ["--tokenizer=nonsense"], "there is no tokenizer 'nonsense'"),
    ("python", ["--input=EMPTY"], "holds no Python source"),
    ("shakespeare", ["--input=OTHER"], "is not tiny Shakespeare"),
    ("shakespeare", ["--input=MISSING"], "pass it as --input=FILE"),
    ("text", [], "name a text file or a folder with --input=PATH"),
    ("text", ["--input=MISSING"], "name a text file or a folder"),
    ("text", ["--input=BINARY"], "is not UTF-8 text"),
    ("text", ["--input=EMPTY"], "no text for the"),
    ("text", ["--inptu=x"], "did you mean input?"),
])
def test_bad_settings_of_the_prepare_scripts(tmp_path, capsys, name, args, words):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "OTHER").write_text("To be")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\0")
    args = [arg.replace("=", f"={tmp_path}/") if arg.startswith("--input=") else arg for arg in args]
    assert words in fails(program(name), [*args, f"--data_dir={tmp_path / 'data'}"], capsys)
    assert not list(tmp_path.glob("data/*"))


def test_a_data_set_of_another_tokenizer_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    args = [f"--input={tmp_path / 'a.txt'}", f"--data_dir={tmp_path / 'data'}"]
    program("text")(args)
    meta = (tmp_path / "data/meta.json").read_text()
    (tmp_path / "data/meta.json").write_text(meta.replace('"byte"', '"gpt2"'))
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    error = fails(program("text"), args, capsys)
    assert "tokenizer 'gpt2', not 'byte'" in error
    assert "pass another --data_dir, or --overwrite=True" in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}


def test_a_damaged_data_set_is_mended_by_the_command_that_the_error_names(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    args = [f"--input={tmp_path / 'a.txt'}", f"--data_dir={tmp_path / 'data'}"]
    program("text")(args)
    before = (tmp_path / "data/meta.json").read_bytes()
    (tmp_path / "data/meta.json").write_text("{")
    program("text")(args)
    assert before == (tmp_path / "data/meta.json").read_bytes()


@pytest.mark.parametrize("content", ['{"vocab_size": 65}', "[1]"])
def test_the_files_of_another_program_stay(tmp_path, capsys, content):
    """A meta.json that is not of a data set was deleted, with the train.bin beside it."""
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/meta.json").write_text(content)
    (tmp_path / "data/train.bin").write_bytes(b"theirs")
    args = [f"--input={tmp_path / 'a.txt'}", f"--data_dir={tmp_path / 'data'}"]
    assert "meta.json is of another program: pass another --data_dir" in fails(program("text"), args, capsys)
    assert (tmp_path / "data/train.bin").read_bytes() == b"theirs"
    program("text")([*args, "--overwrite=True"])
    assert dataloader.Dataset(tmp_path / "data").val.n_tokens > 1


@pytest.mark.parametrize("name,other,skipped", [("text", b"\xff\xfe", "UTF-8"), ("python", b"", None)])
def test_the_only_file_of_the_validation_split_has_text(tmp_path, capsys, name, other, skipped):
    """Of fewer than 20 files one is held out; where that was a picture or an empty __init__.py, there was "no text"."""
    for number in range(8):
        (tmp_path / f"{number}.py").write_text(f"x = {number}")
    first = min(tmp_path.iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    first.write_bytes(other)
    program(name)([f"--input={tmp_path}", f"--data_dir={tmp_path / 'data'}"])
    # a text of 5 bytes and end-of-text, and before it that of the empty file
    assert dataloader.Dataset(tmp_path / "data").val.n_tokens == 6 + (name == "python")
    assert (f"skipped because not {skipped}: 1 file ({first.name})" in capsys.readouterr().out) == (skipped is not None)


def test_a_python_data_set_names_its_source(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"package/{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"package/{name}.py").write_text("x = 1")
    program("python")([f"--input={tmp_path / 'package'}", f"--data_dir={tmp_path / 'data'}"])
    assert dataloader.Dataset(tmp_path / "data").meta["source"] == "package"
    args = [f"--input={tmp_path / 'package/a.py'}", f"--data_dir={tmp_path / 'data'}"]
    assert "a.py is a file: name a folder of Python source" in fails(program("python"), args, capsys)


def test_a_folder_does_not_hide_an_encoding(tmp_path, monkeypatch):
    """After a download of a model called gpt2, --tokenizer=gpt2 was its tokenizer.json."""
    (tmp_path / "byte").mkdir()
    (tmp_path / "byte/tokenizer.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert open_tokenizer("byte").name == "byte"
    with pytest.raises(UserError, match="tokenizer.json"):
        open_tokenizer("./byte")


def test_a_prepare_script_downloads_and_checks(tmp_path, capsys, monkeypatch):
    """The download is of a file:// address here; its hash must be the stated one."""
    program("shakespeare")
    module = sys.modules["prepare_shakespeare"]
    (tmp_path / "input.txt").write_text("ab" * 50)
    monkeypatch.setattr(module, "URL", f"file://{tmp_path}/input.txt")
    assert "another sha256" in fails(module.main, [f"--data_dir={tmp_path / 'data'}"], capsys)
    monkeypatch.setattr(module, "SHA256", "2d4d3e3ba41a8c3ee2b7b9ee1dfb45a2a9d4f8c2")
    assert "another sha256" in fails(module.main, [f"--data_dir={tmp_path / 'data'}"], capsys)
    import hashlib
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"ab" * 50).hexdigest())
    module.main([f"--data_dir={tmp_path / 'data'}"])
    assert (tmp_path / "data/train.bin").stat().st_size == 2 * 91 and (tmp_path / "data/val.bin").stat().st_size == 2 * 11


def test_a_number_of_local_ranks_that_is_none(toy_run, monkeypatch, capsys):
    """It was a ValueError."""
    for value in ("", "two"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        train.main([*toy_run, "--max_steps=1", "--overwrite=True"])
    assert capsys.readouterr().out.count("\ndone in") == 2


@pytest.mark.parametrize("env,words", [
    (dict(RANK="abc"), "RANK=abc, WORLD_SIZE=None, LOCAL_RANK=None, MASTER_ADDR=None, MASTER_PORT=None is not what torchrun sets"), (dict(WORLD_SIZE="0"), "is not what"),
    (dict(RANK="1"), "is not what"), (dict(WORLD_SIZE="2"), "is not what"),
    (dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1"), "LOCAL_RANK=None"), (dict(LOCAL_RANK=""), "is not what"),
    *((dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR=address, MASTER_PORT=port), "is not what")
      for address, port in (("", "29500"), ("localhost", "abc"), ("localhost", ""), ("localhost", "65536"), ("localhost", "9" * 5000)))])
def test_bad_environments(toy_run, trained, capsys, monkeypatch, env, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert words in fails(train.main, toy_run, capsys)
    assert words in fails(sample.main, [f"--out_dir={trained}"], capsys)


@pytest.mark.parametrize("change,words", [
    (lambda s: s["optimizer"]["state"]["embed.weight"].update(exp_avg=torch.zeros(3)), "optimizer's state in the checkpoint does not fit"),
    (lambda s: s["optimizer"]["state"]["embed.weight"].pop("exp_avg"), "optimizer's state in the checkpoint does not fit"),
    (lambda s: s.update(optimizer={"state": {}}, step=10, settings=s["settings"] | {"max_steps": 20}), "optimizer's state in the checkpoint does not fit"),
    (lambda s: s["optimizer"].update(state=3), "optimizer's state in the checkpoint does not fit"),
    (lambda s: s["config"].pop("vocab_size"), "has no vocab_size"),
    (lambda s: s["config"].update(block_size=32.5), "block_size must be a whole number"),
    (lambda s: s["config"].update(colour=1), "has the setting colour, which this version does not know"),
    (lambda s: s["settings"].update(dtype="float99"), "dtype must be auto or float32"),
    (lambda s: s["settings"].update(device=3), "device must be text"),
    (lambda s: s["model"].update({3: torch.zeros(1)}), "a key of model is 3, not of type str"),
    (lambda s: s["model"]["norm.weight"].fill_(torch.nan), "are not finite"),
    (lambda s: s.update(step=-5), "step is -5, which is not a count"),
])
def test_checkpoints_of_odd_content(trained, tmp_path, capsys, change, words):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    state = torch.load(folder / "ckpt.pt")
    change(state)
    torch.save(state, folder / "ckpt.pt")
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert words in fails(train.main, [f"--out_dir={folder}", "--init_from=resume"], capsys)
    assert metrics == (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("change", [
    lambda m: m.update(vocab_size=257.0), lambda m: m.update(vocab_size=10**30), lambda m: m.update(tokenizer="unheard-of"),
    lambda m: m.update(tokenizer="tokenizer.json \x1b[2J"), lambda m: m.update(tokenizer="tokenizer.json " + "a" * 200),
    lambda m: m["splits"]["train"][0].update(tokens=1.5), lambda m: m["splits"]["val"][0].update(bytes=0), lambda m: m.pop("splits")])
def test_odd_meta_files(toy_data, toy_run, tmp_path, capsys, change):
    shutil.copytree(toy_data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text(encoding="utf-8"))
    change(meta)
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    assert "is not the meta.json of a data set" in fails(train.main, [*toy_run, f"--dataset={tmp_path / 'data'}"], capsys)


@pytest.mark.parametrize("args,words", [
    ([f"--n_layer={'9' * 400}"], "n_layer must be a whole number"), (["--n_layer=9223372036854775808"], "n_layer must be a whole"),
    (["--vocab_size=17592186044416"], "GB: lower n_layer, n_embd"), (["--n_ff=4611686018427387904"], "a model of this size cannot be created"),
    ([f"--out_dir={'x' * 300}"], "cannot use"), (["--device=cpu:"], "unknown device 'cpu:'"), (["--out_dir=a\0b"], "out_dir must be text")])
def test_huge_and_odd_values(toy_run, capsys, args, words):
    error = fails(train.main, [*toy_run, *args], capsys)
    assert words in error and len(error) < 500


def test_source_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "lib/x.py").mkdir(parents=True)
    (tmp_path / "lib/a.py").write_text("a = 1\n")
    (tmp_path / "lib/b.py").write_text("# coding: nonsense\n")
    error = fails(program("python"), [f"--input={tmp_path / 'lib'}", f"--data_dir={tmp_path / 'data'}"], capsys)
    assert "no text for the" in error and "--input" in error


def test_byte_order_marks_are_no_text(toy_run, trained, tmp_path, capsys):
    """Editors on Windows begin a file with one: a config was refused, and prompts and training text had it as a character."""
    (tmp_path / "x.py").write_text("max_steps = 1\n", encoding="utf-8-sig")
    assert parse(TrainConfig, [str(tmp_path / "x.py")], "")["max_steps"] == 1
    (tmp_path / "prompts.txt").write_text("one\r\ntwo", encoding="utf-8-sig")
    assert read_prompts("", str(tmp_path / "prompts.txt")) == ["one", "two"]
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / name).write_text("xyz" * 20, encoding="utf-8-sig")
    for number, source in enumerate(("texts", "texts/a")):
        program("text")([f"--input={tmp_path / source}", "--tokenizer=byte", f"--data_dir={tmp_path / str(number)}"])
        assert (tmp_path / str(number) / "train.bin").read_bytes()[:6] == b"x\0y\0z\0"


def test_a_text_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    """The message was about the folder of the data set."""
    (tmp_path / "text").write_text("abc")

    def refuse(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    error = fails(program("text"), [f"--input={tmp_path / 'text'}", f"--data_dir={tmp_path / 'data'}", "--tokenizer=byte"], capsys)
    assert f"cannot read {tmp_path / 'text'} (Permission denied)" in error


def test_a_download_of_something_else(tmp_path, capsys, monkeypatch):
    """A page of a proxy instead of the tokenizer's file: gpt2 was called unknown, and listed among the known."""
    def other(name):
        raise ValueError("Hash mismatch for data downloaded from https://...")
    monkeypatch.setattr("tiktoken.get_encoding", other)
    error = fails(program("python"), ["--tokenizer=gpt2", f"--data_dir={tmp_path}"], capsys)
    assert "cannot be downloaded" in error and "there is no tokenizer" not in error


def test_where_a_checkpoint_is_missing_or_has_its_tokenizer(toy_run, trained, tmp_path, capsys, monkeypatch):
    """A mistyped out_dir was blamed on init_from. A checkpoint file was named as a tokenizer."""
    error = fails(train.main, [arg.replace("/run", "/tpyo") for arg in toy_run] + ["--init_from=resume"], capsys)
    assert "there is no checkpoint" in error and "init_from" not in error
    config = TrainConfig(init_from=str(trained / "ckpt_best.pt"))
    monkeypatch.setattr(resume, "name_today", lambda name, folder, wanted: name)
    state = dict(tokenizer="tokenizer.json-0123")
    with pytest.raises(UserError, match=f"prepare the data with --tokenizer={trained}$"):
        resume.check_data(config, state, dict(tokenizer="byte", sha256=""))
