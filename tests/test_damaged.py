"""Files that are read back and lie: checkpoints, and data sets at resume. Each is one sentence."""
import collections
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import load, load_model, toy_ids, toy_model
from test_inputs import fails, trained  # noqa: F401

import sample
import train
from model import GPT, GPTConfig
from nanogqa import checkpoint, dataloader, resume, runtime, saver, schema, terminal
from nanogqa.configurator import UserError
from nanogqa.costs import meta_model
from nanogqa.dataloader import Dataset
from nanogqa.prompts import encode_prompts, read_prompts
from nanogqa.tokenizer import get_tokenizer, only_allowed

WEIGHT = "layers.0.mlp.up_proj.weight"  # (96, 32)
SHAPE = (96, 32)


# -- tensors ---------------------------------------------------------------------------------------

def tensors_of_other_kinds():
    """Tensors with the right shape that are not what a checkpoint holds, by name."""
    zeros = torch.zeros(SHAPE)
    return {
        "sparse": zeros.to_sparse(), "csr": zeros.to_sparse_csr(),
        "meta": torch.zeros(SHAPE, device="meta"),
        "quantized": torch.quantize_per_tensor(zeros, 1.0, 0, torch.qint8),
        "integer": zeros.long(), "bool": zeros.bool(), "complex": zeros.to(torch.complex64),
        "float8": zeros.to(torch.float8_e4m3fn), "expanded": torch.zeros(1).expand(SHAPE),
        "overlapping": torch.zeros(200).as_strided(SHAPE, (1, 1)),
        "huge": torch.zeros(1).expand(10**6, 10**6), "list": [1.0], "None": None,
    }


KINDS = list(tensors_of_other_kinds())


def meta_and_state(run_dir):
    """The model of a checkpoint without values, and the checkpoint."""
    state = checkpoint.load(run_dir, GPTConfig)
    return meta_model(GPT, GPTConfig(**state["config"])), state


def test_weights_for_a_sharded_model_are_checked_too(trained):  # noqa: F811
    """--parallel=fsdp took no notice of missing weights, whose memory kept what was in it."""
    model, good = meta_and_state(trained)
    assert torch.equal(checkpoint.weight_source(model, good, None)(WEIGHT, SHAPE), good["model"][WEIGHT])
    assert checkpoint.weight_source(model, dict(good, model={}), None)(WEIGHT, SHAPE) is None, "sharded"
    assert checkpoint.weight_source(model, None, lambda *args: args)(WEIGHT, SHAPE) == (WEIGHT, SHAPE)
    missing = {name: x for name, x in good["model"].items() if name != WEIGHT}
    wrong = good["model"] | {WEIGHT: torch.zeros(SHAPE[::-1])}
    unknown = good["model"] | {"other": torch.zeros(2)}
    for weights, words in ((missing, f"{WEIGHT} is missing"), (unknown, "other is unknown"),
                           (wrong, f"{WEIGHT} has the shape .32, 96., not .96, 32.")):
        with pytest.raises(UserError, match=f"do not fit its config .{words}"):
            checkpoint.weight_source(model, dict(good, model=weights), None)
    for value in (torch.full(SHAPE, torch.inf), torch.full(SHAPE, 1e300, dtype=torch.float64)):
        infinite = dict(good, model=good["model"] | {WEIGHT: value})
        with pytest.raises(UserError, match="weights in the checkpoint are not finite"):
            checkpoint.weight_source(model, infinite, None)
        with pytest.raises(UserError, match="weights in the checkpoint are not finite"):
            checkpoint.load_model(GPT, model.config, infinite)


def test_attributes_of_dicts_are_not_read(trained, tmp_path):  # noqa: F811
    """torch.load restores those of an OrderedDict. They hide its methods, and load_state_dict reads _metadata."""
    plain = checkpoint.load(trained, GPTConfig)

    def hostile(value):
        if not isinstance(value, dict):
            return value
        copy = collections.OrderedDict((key, hostile(inner)) for key, inner in value.items())
        for name in ("_metadata", "keys", "values", "get", "setdefault", "copy"):  # pickle needs items
            copy.__dict__[name] = 5
        return copy
    torch.save({key: hostile(value) for key, value in plain.items()}, tmp_path / "ckpt.pt")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"].keys == 5, "it is as hostile as intended"
    loaded = checkpoint.load(tmp_path, GPTConfig)
    model = checkpoint.load_model(GPT, GPTConfig(**loaded["config"]), loaded)
    assert torch.equal(model.state_dict()[WEIGHT], plain["model"][WEIGHT])
    optimizers = train.make_optimizers(model, train.TrainConfig())
    checkpoint.load_moments(model, optimizers, loaded)


def test_attributes_of_tensors_are_not_read(trained, tmp_path):  # noqa: F811
    """weights_only restores them too: float = 5 was a TypeError."""
    state = torch.load(trained / "ckpt.pt")
    weight = state["model"][WEIGHT]
    weight.float = 5
    torch.save(state, tmp_path / "ckpt.pt")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"][WEIGHT].float == 5, "it is as hostile as intended"
    model = load_model(tmp_path)
    assert torch.equal(model.state_dict()[WEIGHT], load(trained)["model"][WEIGHT])


def test_moments_in_another_order_of_memory(trained, tmp_path):  # noqa: F811
    """A fused optimizer walks through memory and does not look at strides."""
    state = torch.load(trained / "ckpt.pt")
    moments = state["optimizer"]["state"][WEIGHT]
    wanted = moments["exp_avg"].clone()
    moments["exp_avg"] = moments["exp_avg"].t().contiguous().t()
    assert not moments["exp_avg"].is_contiguous()
    torch.save(state, tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path, GPTConfig)
    model = load_model(tmp_path)
    optimizers = train.make_optimizers(model, train.TrainConfig())
    checkpoint.load_moments(model, optimizers, loaded)
    found = optimizers[0].state[dict(model.named_parameters())[WEIGHT]]["exp_avg"]
    assert found.is_contiguous() and torch.equal(found, wanted)


def test_a_checkpoint_does_not_choose_where_its_run_writes(trained, tmp_path, monkeypatch):  # noqa: F811
    """A resumed run took out_dir from the settings in its checkpoint, and wrote there."""
    state = torch.load(trained / "ckpt.pt")
    other = tmp_path / "other"
    state["settings"].update(out_dir=str(other), eval_only=True, overwrite=True, profile=True)
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    torch.save(state, "out/ckpt.pt")
    config, _ = resume.config_and_state(dict(init_from="resume"), train.TrainConfig, train.GPTConfig)
    assert config.out_dir == "out"
    assert not (config.eval_only or config.overwrite or config.profile)


def test_a_checkpoint_without_weights(trained, tmp_path, capsys):  # noqa: F811
    """It was taken for a sharded one, whose weights are in other files."""
    state = torch.load(trained / "ckpt.pt")
    torch.save(dict(state, model={}), tmp_path / "ckpt.pt")
    assert "is not a checkpoint of this program (its model is empty)" in fails(
        sample.main, [f"--out_dir={tmp_path}"], capsys)


def test_text_of_a_checkpoint_cannot_change_the_terminal(trained, tmp_path, capsys):  # noqa: F811
    state = torch.load(trained / "ckpt.pt")
    state["runtime"]["device"] = "\x1b]0;x\x07"
    torch.save(state, tmp_path / "ckpt.pt")
    terminal.announce_resume(checkpoint.load(tmp_path, GPTConfig), {}, runtime.pick_runtime("cpu", "float32", False))
    out = capsys.readouterr().out
    assert "changed: device" in out and out.rstrip("\n").isprintable()


def test_dicts_that_hold_each_other_are_copied_once():
    one = {}
    for _ in range(100):
        one = dict(a=one, b=one)
    endless = {}
    endless["self"] = endless
    copy = checkpoint.plain_dicts(one, {})
    assert copy["a"] is copy["b"] and copy["a"]["a"] is copy["b"]["b"]
    copy = checkpoint.plain_dicts(endless, {})
    assert copy["self"] is copy and copy is not endless


def test_missing_bytes_are_damage(trained, tmp_path):  # noqa: F811
    """zipfile then seeks to a negative place, an OSError, which was called a fault of the disk."""
    content = (trained / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(content[:100] + content[108:])
    with pytest.raises(checkpoint.Damaged, match="is damaged or not a checkpoint"):
        checkpoint.load(tmp_path, GPTConfig)


def test_another_trainable_is_not_called_damage(trained, tmp_path):  # noqa: F811
    """The moments of a sharded checkpoint are those of other parameters then."""
    model, state = meta_and_state(trained)
    (tmp_path / "sharded_1").mkdir()
    (tmp_path / "sharded_1/state.json").write_text("{}")
    config = train.TrainConfig(out_dir=str(tmp_path))
    with pytest.raises(UserError, match="moments of 1 parameters, and [0-9]+ are trained: leave trainable"):
        checkpoint.load_sharded(config, model, [torch.optim.AdamW(model.parameters())],
                                dict(state, optimizer={WEIGHT: 1.0}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_moments_of_another_kind(trained, tmp_path, capsys, kind):  # noqa: F811
    good = torch.load(trained / "ckpt.pt")
    assert good["model"][WEIGHT].shape == SHAPE
    resume = [f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=3"]
    good["model"][WEIGHT] = tensors_of_other_kinds()[kind]
    torch.save(good, tmp_path / "ckpt.pt")
    for main, args in ((train.main, resume), (sample.main, [f"--out_dir={tmp_path}"])):
        assert "is not a dense float tensor" in fails(main, args, capsys)
    good = torch.load(trained / "ckpt.pt")
    for moment in ("exp_avg", "step"):
        good["optimizer"]["state"][WEIGHT][moment] = tensors_of_other_kinds()[kind]
        torch.save(good, tmp_path / "ckpt.pt")
        assert "optimizer's state in the checkpoint does not fit" in fails(
            train.main, resume, capsys)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["ckpt.pt"]


@pytest.mark.parametrize("x", [
    torch.zeros(4, 6), torch.zeros(4, 6).T, torch.zeros(5, 7)[:, ::2], torch.zeros(2, 3, 4)[:, 1],
    torch.zeros(1).expand(1, 1), torch.zeros(3, 0), torch.tensor(1.0), torch.zeros(2).bfloat16(),
    torch.nn.Parameter(torch.zeros(2)), torch.zeros(2, 3, 4).permute(2, 0, 1)])
def test_slices_and_transposes_are_dense(x):
    assert checkpoint.dense_float_tensor(x)


@pytest.mark.parametrize("change,words", [
    (lambda m: m["step"].fill_(torch.nan), "step has values that no step can give"),
    (lambda m: m["step"].fill_(-1), "it is at step -1.0"),
    (lambda m: m["step"].fill_(3), "it is at step 3.0"),
    (lambda m: m["exp_avg"].fill_(torch.nan), "exp_avg has values that no step can give"),
    (lambda m: m["exp_avg_sq"].sub_(1), "exp_avg_sq has values that no step can give"),
    (lambda m: m.update(exp_avg=m["exp_avg"].double()), "exp_avg is torch.float64"),
    (lambda m: m.update(exp_avg=torch.zeros(32, 96)), "exp_avg is torch.float32 of shape (32, 96)"),
    (lambda m: m.update(step=torch.zeros(1)), "step is torch.float32 of shape (1,)"),
    (lambda m: m.update(more=torch.zeros(1)), "it has the moments step, exp_avg, exp_avg_sq, more"),
    (lambda m: m.update({3: torch.zeros(1)}), "it has the moments"),
    (lambda m: m.clear(), "has no step"),
])
def test_moments_that_no_run_can_have(trained, tmp_path, capsys, change, words):  # noqa: F811
    state = torch.load(trained / "ckpt.pt")
    change(state["optimizer"]["state"][WEIGHT])
    torch.save(state, tmp_path / "ckpt.pt")
    args = [f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=3"]
    assert words in fails(train.main, args, capsys)


@pytest.mark.parametrize("change", [
    lambda s: s.update(state={-1: {}}), lambda s: s.update(state={10**9: {}}),
    lambda s: s.update(state={True: {}}), lambda s: s.update(state=[]),
    lambda s: s["state"].update({WEIGHT: []}), lambda s: s["state"].update({3: {}}),
    lambda s: s["state"].update({"other": {}}), lambda s: s["state"].pop(WEIGHT)])
def test_an_optimizer_of_another_structure(trained, tmp_path, capsys, change):  # noqa: F811
    state = torch.load(trained / "ckpt.pt")
    change(state["optimizer"])
    torch.save(state, tmp_path / "ckpt.pt")
    assert "optimizer's state in the checkpoint does not fit" in fails(
        train.main, [f"--out_dir={tmp_path}", "--init_from=resume"], capsys)


# -- plain values ----------------------------------------------------------------------------------

def billion_laughs():
    nested = ["x"] * 10
    for _ in range(9):
        nested = [nested] * 10
    return nested


def endless():
    nested = {}
    nested["x"] = nested
    return nested


ODD = {
    "key": {3: 1}, "list": [1], "None": None, "True": True, "nan": float("nan"), "1e600": 10**600,
    "laughs": billion_laughs(), "endless": endless(), "tensor": torch.zeros(3), "complex": 1j,
    "bytes": b"x", "control": "a\n\x1b[2Jb", "long": "x" * 10**5,
}
# what may stand there: sample.py does not read the optimizer's state
LEGAL = {("val_loss", "None"), ("best_val_loss", "None"), ("kept", "None"), ("kept", "list"),
         ("optimizer", "key"), ("optimizer", "endless")}


@pytest.mark.parametrize("kind", ODD)
def test_plain_values_of_another_kind(trained, tmp_path, capsys, kind):  # noqa: F811
    for key in checkpoint.KEYS:
        if (key, kind) in LEGAL:
            continue
        state = torch.load(trained / "ckpt.pt")
        state[key] = ODD[kind]
        torch.save(state, tmp_path / "ckpt.pt")
        error = fails(sample.main, [f"--out_dir={tmp_path}", "--device=cpu"], capsys)
        assert "is not a checkpoint of this program" in error and key in error, (key, error)
        assert len(error) < 500 and "\x1b" not in error


@pytest.mark.parametrize("section", ["config", "settings", "runtime"])
@pytest.mark.parametrize("kind", sorted(set(ODD) - {"None", "True", "control", "long"}))
def test_values_of_settings_of_another_kind(trained, tmp_path, capsys, section, kind):  # noqa: F811
    state = torch.load(trained / "ckpt.pt")
    for key in [*state[section]][:3]:
        changed = torch.load(trained / "ckpt.pt")
        changed[section][key] = ODD[kind]
        torch.save(changed, tmp_path / "ckpt.pt")
        args = [f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=2"]
        if section == "runtime" and kind == "nan":  # only printed
            continue
        error = fails(train.main, args, capsys)
        assert key in error and len(error) < 500


def test_every_entry_that_is_missing_is_named(trained, tmp_path, capsys):  # noqa: F811
    for key, (_, default) in checkpoint.KEYS.items():
        state = torch.load(trained / "ckpt.pt")
        del state[key]
        torch.save(state, tmp_path / "ckpt.pt")
        if default is checkpoint.REQUIRED:
            error = fails(sample.main, [f"--out_dir={tmp_path}", "--device=cpu"], capsys)
            assert f"its content has no {key}" in error
        else:
            assert load(tmp_path)[key] is default


# -- the archive -----------------------------------------------------------------------------------

def test_an_archive_that_unpacks_to_more_than_its_size(trained, tmp_path, capsys):  # noqa: F811
    """Compressed zeros, and entries that overlap: the directory lists one entry many times."""
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    error = fails(sample.main, [f"--out_dir={tmp_path}"], capsys)
    assert "unpacks to more than its size" in error
    shutil.copy(trained / "ckpt.pt", tmp_path / "ckpt.pt")
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * 1000
        archive._didModify = True
    error = fails(sample.main, [f"--out_dir={tmp_path}"], capsys)
    assert "unpacks to more than its size" in error


# -- sharded checkpoints ---------------------------------------------------------------------------

@pytest.fixture
def sharded(trained, tmp_path):  # noqa: F811
    """A run with a sharded checkpoint, as rank 0 of 1 would write it; its folder."""
    pytest.importorskip("safetensors")
    state = load(trained)
    folder = tmp_path / "run/sharded_2"
    parts, plain = saver.split(state)
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(parts, storage_writer=writer)
    (folder / "state.json").write_text(json.dumps(plain))
    return folder


def resume_sharded(folder):
    """Reads the checkpoint into a model and its optimizers, as a resumed run does."""
    out_dir = folder.parent
    given = dict(out_dir=str(out_dir), init_from="resume")
    config, state = resume.config_and_state(given, train.TrainConfig, train.GPTConfig)
    model = train.GPT(train.subset(train.GPTConfig, config))
    optimizers = train.make_optimizers(model, config)
    checkpoint.restore(config, state, model, optimizers)
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_checkpoint_is_checked_like_another(trained, sharded):  # noqa: F811
    model = resume_sharded(sharded)
    weights = load(trained)["model"]
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    good = json.loads((sharded / "state.json").read_text(encoding="utf-8"))
    changes = [dict(optimizer={"a": "x"}), dict(optimizer={**good["optimizer"], WEIGHT: [1]}),
               dict(optimizer={**good["optimizer"], WEIGHT: float("nan")}),
               dict(optimizer={**good["optimizer"], WEIGHT: 10**400}), dict(model={WEIGHT: 1.0}),
               dict(step=1.5), dict(step=None), dict(settings=[]), dict(config={"n_layer": [1]}),
               dict(optimizer={**good["optimizer"], WEIGHT: -1}), dict(runtime={"ranks": {}})]
    for change in changes:
        (sharded / "state.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="is damaged|is not a checkpoint"):
            resume_sharded(sharded)
    (sharded / "state.json").write_text(json.dumps(good | dict(
        optimizer={}, step=400, settings=good["settings"] | {"max_steps": 400})))
    with pytest.raises(UserError, match="holds moments of 0 parameters"):  # they began again at zero
        resume_sharded(sharded)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part,value,words", [
    (f"model.{WEIGHT}", torch.nan, "are not finite"), (f"exp_avg.{WEIGHT}", torch.nan, "are not finite"),
    (f"exp_avg_sq.{WEIGHT}", -1.0, "is below 0, which no step gives")])  # its root would be NaN
def test_a_sharded_checkpoint_with_values_that_are_impossible(sharded, trained, part, value, words):  # noqa: F811
    parts, _ = saver.split(load(trained))
    parts[part].fill_(value)
    for path in sharded.glob("*.safetensors"):
        path.unlink()
    writer = dcp.HuggingFaceStorageWriter(str(sharded), save_distributed=True)
    dcp.save(parts, storage_writer=writer)
    with pytest.raises(UserError, match=words):
        resume_sharded(sharded)


# -- data at resume --------------------------------------------------------------------------------

def swap(path):
    """Damage within the vocabulary: two different tokens change places."""
    data = bytearray(path.read_bytes())
    other = next(i for i in range(2, len(data), 2) if data[i] != data[0])
    data[0], data[other] = data[other], data[0]
    path.write_bytes(data)


def test_damage_within_the_vocabulary_is_noticed_at_resume(trained, toy_data, tmp_path, capsys):  # noqa: F811
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(toy_data, tmp_path / "data")
    args = [f"--out_dir={tmp_path / 'run'}", f"--dataset={tmp_path / 'data'}",
            "--init_from=resume", "--max_steps=3"]
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    for name in ("train.bin", "val.bin"):
        swap(tmp_path / "data" / name)
        error = fails(train.main, args, capsys)
        assert f"{name} is damaged (its sha256 is not that in meta.json)" in error
        shutil.copy(f"{toy_data}/{name}", tmp_path / "data")
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before
    train.main(args)
    assert load(tmp_path / "run")["step"] == 3


def test_hashes_in_meta_json_that_do_not_agree(toy_data, tmp_path):
    shutil.copytree(toy_data, tmp_path / "data")
    Dataset(str(tmp_path / "data")).verify()
    swap(tmp_path / "data/train.bin")
    meta = json.loads((tmp_path / "data/meta.json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="train.bin is damaged"):
        Dataset(str(tmp_path / "data")).verify()
    with open(tmp_path / "data/train.bin", "rb") as file:
        digest = dataloader.hashlib.file_digest(file, "sha256").hexdigest()
    meta["splits"]["train"][0]["sha256"] = digest
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="meta.json is damaged"):
        Dataset(str(tmp_path / "data")).verify()


def test_verifying_much_data_is_announced(toy_data, capsys, monkeypatch):
    Dataset(toy_data).verify()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(dataloader, "SLOW", 10)
    Dataset(toy_data).verify()
    assert "verifying the" in capsys.readouterr().out


def test_a_fresh_start_does_not_read_the_whole_data_set(toy_data, monkeypatch):
    monkeypatch.setattr(Dataset, "verify", None)
    for init_from in ("scratch", "another/run"):
        resume.verify_data(train.TrainConfig(init_from=init_from), Dataset(toy_data))


# -- names and paths -------------------------------------------------------------------------------

def test_an_out_dir_with_the_name_of_a_file(toy_run, trained, tmp_path, capsys):  # noqa: F811
    args = [*toy_run, f"--out_dir={tmp_path / 'x.pt'}"]
    assert "choose another --out_dir" in fails(train.main, args, capsys)
    assert not (tmp_path / "x.pt").exists()
    shutil.copytree(trained, tmp_path / "x.pt")  # an earlier version has trained there
    shutil.copy(trained / "ckpt.pt", tmp_path / "copied")
    for place in ("x.pt", "x.pt/ckpt.pt", "copied"):
        assert load(tmp_path / place)["step"] == 2
    train.main([f"--out_dir={tmp_path / 'x.pt'}", "--init_from=resume", "--max_steps=3"])
    assert load(tmp_path / "x.pt")["step"] == 3


@pytest.mark.parametrize("name", ["out_dir", "dataset", "init_from", "device", "wandb_project"])
def test_an_empty_text_is_refused(toy_run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    error = fails(train.main, [*toy_run, f"--{name}="], capsys)
    assert f"{name} must not be empty" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["\0", "a\ud800"])
def test_a_text_that_no_file_can_have_as_a_name(trained, capsys, text):  # noqa: F811
    for name in ("out_dir", "prompt", "prompts", "stop", "device"):
        error = fails(sample.main, [f"--out_dir={trained}", f"--{name}={text}"], capsys)
        assert f"{name} must be text" in error


def test_an_empty_text_in_a_config_file_is_refused(toy_run, tmp_path, capsys):
    (tmp_path / "c.py").write_text('out_dir = ""\n')
    assert "out_dir must not be empty" in fails(
        train.main, [*toy_run, str(tmp_path / "c.py")], capsys)


# -- prompts ---------------------------------------------------------------------------------------

def test_lines_of_prompts_end_with_a_newline_alone(tmp_path):
    prompts = ["a\u2028b", "c\x0bd\x0ce", "f\x85g", "", "h\x1ci", "j\rk", " l "]
    for end in ("\n", "\r\n"):
        path = tmp_path / "prompts.txt"
        path.write_bytes((end.join(prompts) + end).encode())
        assert read_prompts("", str(path)) == prompts
        path.write_bytes(end.join(prompts).encode())
        assert read_prompts("", str(path)) == prompts
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    assert read_prompts("", str(tmp_path / "prompts.jsonl")) == prompts
    (tmp_path / "one.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_prompts(f"FILE:{tmp_path / 'one.txt'}", None) == ["a\nb\rc\n"]


def test_prompt_and_prompts_exclude_each_other(trained, tmp_path, capsys):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a\n")
    args = [f"--out_dir={trained}", "--prompt=x", f"--prompts={tmp_path / 'prompts.txt'}"]
    assert "prompt and prompts exclude each other" in fails(sample.main, args, capsys)


def test_a_token_that_the_model_has_no_row_for():
    encoding = get_tokenizer("byte")
    assert encode_prompts(encoding, ["ab", ""], 257) == [[97, 98], [256]]
    for prompts in ([""], ["a<|endoftext|>b"]):
        with pytest.raises(UserError, match="token id 256, but the model has vocab_size=256"):
            encode_prompts(encoding, prompts, 256)


def test_logits_that_are_not_numbers():
    known = torch.tensor([True, False, True])
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert only_allowed(logits, known).tolist() == [[1.0, -torch.inf, 3.0]]
    assert only_allowed(logits, None) is logits
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="logits are not finite"):
            only_allowed(torch.tensor([[1.0, bad, 3.0]]), known)


def test_weights_so_large_that_the_logits_overflow():
    model = toy_model()
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    with pytest.raises(UserError, match="logits are not finite"):
        list(sample.generate(model, [toy_ids(1, 4)[0].tolist()], 2))


# -- schema ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [10**400, -10**400, float("inf"), True, "1", None, [1], 1j])
def test_numbers_are_finite(value):
    assert not schema.number(value)
    with pytest.raises(ValueError, match="which is not a number"):
        schema.check({"a": value}, {"a": schema.number})


def test_messages_are_short_whatever_the_value():
    for value in (billion_laughs(), endless(), 10**5000, "x" * 10**6, torch.zeros(1000)):
        with pytest.raises(ValueError) as error:
            schema.check(value, float)
        assert len(str(error.value)) < 120


def test_data_of_older_versions_is_resumed(trained, toy_data, tmp_path, capsys):  # noqa: F811
    """Their meta.json has one sha256 over documents, and none for each file."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(toy_data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text(encoding="utf-8"))
    for files in meta["splits"].values():
        for file in files:
            del file["sha256"]
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    train.main([f"--out_dir={tmp_path / 'run'}", f"--dataset={tmp_path / 'data'}",
                "--init_from=resume", "--max_steps=3"])
    assert "not verified" in capsys.readouterr().out and load(tmp_path / "run")["step"] == 3
