"""From given settings to a run: what it takes from a checkpoint, and whether it can work.

The classes GPT and GPTConfig, which this package does not import, are passed in.
"""
from dataclasses import asdict, fields
from pathlib import Path

from nanogqa.batches import batch_shape
from nanogqa.checkpoint import check_whole, freeze, load, typed
from nanogqa.configurator import UserError, build, subset
from nanogqa.costs import meta_model
from nanogqa.distributed import agree, barrier, check_parallel, world
from nanogqa.folder import check_free, exists, find_sharded, path_of
from nanogqa.runtime import check_training
from nanogqa.saver import same_windows
from nanogqa.tokenizer import HF_TOKENIZER, name_today

# settings of this call alone: not saved, and not taken from a checkpoint
PER_CALL = {"out_dir", "init_from", "overwrite", "eval_only", "profile"}


def call_settings(given, cls):
    """Builds cls from the settings that apply to this call only (PER_CALL)."""
    return build(cls, {key: value for key, value in given.items() if key in PER_CALL})


def config_and_state(given, cls, GPTConfig):
    """(settings, state) of a run: state is the checkpoint to start from, or None.

    A resumed run takes unspecified settings from its checkpoint; a run from another run's weights
    takes only the model's. cls extends GPTConfig.
    """
    call = call_settings(given, cls)
    init_from = resolved_start(call)
    given = given | {"init_from": init_from}
    if init_from == "scratch":
        return build(cls, given), None
    resume = init_from == "resume"
    source = init_from
    if resume:
        source = call.out_dir
    state = load_start(source, resume, GPTConfig)
    # check given settings first, so that the error names the cause and not what follows from it
    check_model({k: v for k, v in given.items() if v is not None}, state, source, resume)
    base = state["config"]
    if resume:
        saved = {key: value for key, value in state["settings"].items() if key not in PER_CALL}
        base = base | typed(cls, saved, source)
    config = build(cls, base | given)
    config.vocab_size = config.vocab_size or state["config"]["vocab_size"]
    check_model(asdict(config), state, source, resume)
    if resume:
        check_resume(config, state)
    return config, state


def resolved_start(call):
    """init_from of this call, with auto resolved to scratch or resume. Raises UserError if out_dir
    cannot take such a run, or if there would be no weights to evaluate."""
    out_dir, init_from = call.out_dir, call.init_from
    if out_dir.endswith(".pt") and not (call.eval_only or Path(out_dir).is_dir()):
        raise UserError(f"out_dir={out_dir} ends in .pt like a checkpoint file, but a run needs a "
                        "folder: choose another --out_dir")
    if init_from == "auto":
        init_from = "scratch"
        if exists(out_dir):
            init_from = "resume"
    if not (init_from == "resume" or call.overwrite or call.eval_only):
        check_free(out_dir)
    if call.eval_only and init_from == "scratch":
        raise UserError("eval_only needs weights: add --init_from=resume, or --init_from=FOLDER "
                        "with another run's checkpoint")
    return init_from


def load_start(source, resume, GPTConfig):
    """The state of the checkpoint in source, to resume it or to start a new run from its weights.
    Raises UserError if there is none of that kind."""
    if not resume and not Path(source).exists():
        raise UserError(f"init_from={source} does not exist: choose scratch, resume or auto, or "
                        "name a folder that holds a checkpoint or the path of a ckpt_STEP.pt")
    state = load(source, GPTConfig)
    if not resume:
        check_whole(state)
    if resume and not state["settings"]:
        raise UserError(f"{source} holds converted weights and no run to resume: pass it as "
                        f"--init_from={source}, with another --out_dir")
    return state


def steps_done(config, state):
    """Optimizer steps before this run: those of the checkpoint that it resumes, otherwise 0."""
    if config.init_from == "resume":
        return state["step"]
    return 0


def first_new_step(config, state):
    """The first step that this run logs and saves: 0 in a new run; in a resumed one the step after
    the saved one, which is logged already.

    There is one exception: where the saved step is also the last, it may lack its evaluation, one
    over the windows of this run, or a ckpt.pt beside the parts of a sharded one. It is then
    evaluated, logged and saved again, in a row without train_loss and grad_norm.
    """
    if config.init_from != "resume":
        return 0
    lacking = (
        state["val_loss"] is None
        or not same_windows(config, state)
        or find_sharded(config.out_dir) is not None
    )
    if lacking and state["step"] == config.max_steps:
        return state["step"]
    return state["step"] + 1


def check_model(values, state, source, resume):
    """Raises UserError if a model setting in values differs from the checkpoint in source."""
    for name, before in state["config"].items():
        may_change = not resume and name in ("block_size", "dropout")
        if values.get(name, before) != before and not may_change:
            raise UserError(
                f"{name}={values[name]}, but the model in {source} has {before}: leave {name} out, "
                "or start from scratch in another --out_dir")


def check_resume(config, state):
    """Raises UserError if a setting differs that a run must keep to its end."""
    for name in ("seed", "tokens_per_step"):
        value, before = getattr(config, name), state["settings"].get(name)
        if value != before:
            raise UserError(
                f"{name}={value}, but the run in {config.out_dir} has {before}: leave {name} out, "
                "or start another run with another --out_dir")
    if state["step"] > config.max_steps:
        raise UserError(f"the run in {config.out_dir} is at step {state['step']}, beyond "
                        f"max_steps={config.max_steps}: raise it")


def check_start(GPT, GPTConfig, config, state, dataset):
    """Raises UserError if a run cannot start: its data is not that of its checkpoint, ranks
    disagree, or its settings cannot work."""
    step = steps_done(config, state)
    check_data(config, state, dataset.meta)
    check_ranks(config, step, dataset.meta)
    check_run(GPT, GPTConfig, config, dataset, world().ranks, step)


def check_data(config, state, meta):
    """Raises UserError if the data set's meta does not fit the state that a run starts from."""
    if state is None:
        return
    source = config.out_dir if config.init_from == "resume" else config.init_from
    tokenizer = name_today(state["tokenizer"], path_of(source).parent, meta["tokenizer"])
    if tokenizer not in (meta["tokenizer"], "none"):
        same = tokenizer
        if tokenizer.startswith(HF_TOKENIZER):
            same = path_of(source).parent
        raise UserError(
            f"data set {config.dataset!r} has tokenizer {meta['tokenizer']!r}, the model in "
            f"{source} has {tokenizer!r}: prepare the data with --tokenizer={same}")
    if config.init_from == "resume" and meta["sha256"] != state["dataset_sha256"]:
        raise UserError(
            f"data set {config.dataset!r} is not the one that the run in {source} was trained on "
            "(another sha256): prepare that one again, or start another run with another --out_dir")


def check_ranks(config, step, meta):
    """Raises UserError unless all ranks start from the same step, with the same data."""
    resumed = int(config.init_from == "resume")  # a run at step 0 may be new or resumed
    if not (agree(step) and agree(resumed)):
        raise UserError(f"ranks find different checkpoints in {config.out_dir}: choose an "
                        "--out_dir on a disk that all machines share")
    if not agree(int(meta["sha256"][:12], 16)):
        raise UserError(f"machines have different data sets {config.dataset!r}: copy one of them "
                        "to the others")


def verify_data(config, dataset):
    """Verifies the data of a resumed run: one rank of each machine does, the others wait."""
    if config.init_from == "resume":
        if world().local_rank == 0:
            dataset.verify()
        barrier()


def check_run(GPT, GPTConfig, config, dataset, ranks, step=0):
    """Raises UserError if a run of config on that many ranks, from that step on, cannot work.

    train.py calls it before it writes anything, compare.py before the first of its runs.
    """
    if config.min_lr > config.learning_rate:
        raise UserError(f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}, so "
                        "that the rate would rise: lower min_lr too")
    check_parallel(config, ranks)
    dataset.check_config(config)
    batch_size = batch_shape(config, ranks)[0]
    check_training(GPT, config, batch_size, ranks, step)
    if config.trainable:
        freeze(meta_model(GPT, subset(GPTConfig, config)), config.trainable)


def run_settings(config, GPTConfig):
    """The settings that a resumed run takes from its checkpoint, beside those of its model."""
    left_out = PER_CALL | {field.name for field in fields(GPTConfig)}
    return {key: value for key, value in asdict(config).items() if key not in left_out}
