"""Trains a GPT on tokenized text, on one device or, with torchrun, on several.

    python train.py [config.py ...] [--key=value ...]        later settings win
    torchrun --standalone --nproc_per_node=4 train.py config/gpt2_124m.py config/gqa.py
"""
import math
import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from model import GPT, GPTConfig, initial_weight
from nanogqa import checkpoint, distributed, dropout, folder, log, resume, terminal, timing
from nanogqa.batches import Batches, check_multiple, n_right
from nanogqa.configurator import UserError, check_pattern, in_range, parse, program, subset
from nanogqa.costs import meta_model, mfu
from nanogqa.dataloader import Dataset, prepare_default
from nanogqa.fast import accelerate, keep_freed_memory
from nanogqa.runtime import compile_model, pick_runtime
from nanogqa.saver import take_over

# -- settings --------------------------------------------------------------------------------------

@dataclass
class TrainConfig(GPTConfig):
    # files
    out_dir: str = "out"  # folder for ckpt.pt and metrics.jsonl
    overwrite: bool = False  # let a new run replace the one in out_dir
    init_from: str = "scratch"  # scratch, resume, auto (resume if there is a checkpoint), or a path
    dataset: str = "python"  # a folder below data/, or the path of a prepared one
    # length and evaluation
    max_steps: int = 1600  # optimizer steps in total
    eval_interval: int = 400  # steps between evaluations; each one saves a checkpoint
    save_interval: int = 0  # steps between further checkpoints; 0: none
    eval_tokens: int | None = 2**16  # validation tokens, always the same; None: the whole split
    keep_checkpoints: int = 0  # number of ckpt_STEP.pt to keep beside ckpt.pt and ckpt_best.pt
    eval_only: bool = False  # evaluate the checkpoint of init_from (resume: out_dir's) and stop
    log_interval: int = 20  # steps between log lines
    profile: bool = False  # write out_dir/trace.json, a torch.profiler trace of 5 steps
    trainable: str = ""  # train only parameters that match this regular expression; empty: all
    # many devices
    parallel: Literal["ddp", "fsdp"] = "ddp"  # ddp: a full copy on each device; fsdp: sharded
    recompute: bool = False  # run each block again in the backward pass to save memory
    # batch
    tokens_per_step: int = 2**11  # tokens per optimizer step, over all devices and micro-steps
    batch_size: int | None = None  # sequences per forward pass and device; None: all at once
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on blocks' matrices, AdamW on the rest
    learning_rate: float = 3e-3  # peak, after the warm-up
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear over the cooldown
    cooldown: float = 0.2  # wsd: final share of max_steps, in which the rate falls
    min_lr: float = 0.0  # learning rate at the end of the schedule
    warmup_steps: int = 100  # steps of linear warm-up; may be more than max_steps
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # decay of AdamW's mean gradient
    beta2: float = 0.95  # decay of AdamW's mean squared gradient
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no limit
    # where it runs
    seed: int = 1337  # of the weights, the order of the data and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; weights stay float32
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA
    fast: bool = True  # nanogqa/fast.py; False: the plain modules of model.py
    # Weights & Biases
    wandb_log: bool = False  # also log to wandb (WANDB_MODE=offline needs no network)
    wandb_project: str = "nanogqa"  # name of the project
    wandb_run_name: str | None = None  # name of the run; None: out_dir

    def __post_init__(self):
        super().__post_init__()
        in_range(self, "eval_interval log_interval batch_size tokens_per_step eval_tokens", low=1)
        in_range(self, "max_steps learning_rate min_lr warmup_steps weight_decay grad_clip seed "
                       "keep_checkpoints save_interval", low=0)
        in_range(self, "beta1 beta2", low=0, below=1)
        in_range(self, "cooldown", low=0, high=1)
        check_pattern(self, "trainable", "q_proj|k_proj")
        check_multiple(self.tokens_per_step, self.block_size, f"block_size={self.block_size}")


# -- model, schedule, optimizers -------------------------------------------------------------------

def make_model(config, state, runtime):
    """The model on its device, with the weights of the checkpoint state, or new ones without it."""
    gpt_config = subset(GPTConfig, config)
    if config.parallel == "fsdp":
        model = meta_model(GPT, gpt_config)  # the whole model never exists on one device
    elif state is None:
        model = checkpoint.new_model(GPT, gpt_config, config.seed)
    else:
        model = checkpoint.load_model(GPT, gpt_config, state)
    if config.fast:
        accelerate(model)
    dropout.by_sequence(model)
    if config.parallel == "fsdp":
        def initial(name, shape):
            return initial_weight(name, shape, config.seed, config.embed_std)
        distributed.shard(model, runtime, checkpoint.weight_source(model, state, initial))
    model.recompute = config.recompute
    checkpoint.freeze(model, config.trainable)
    return model.to(runtime.device)


def learning_rate(step, config):
    """Learning rate at this step: a linear warm-up, then the schedule down to min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395)
        left = (config.max_steps - step) / max(1, config.cooldown * config.max_steps)
        height = min(1.0, max(0.0, left))
    else:
        done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        height = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.min_lr + (config.learning_rate - config.min_lr) * height


def make_optimizers(model, config):
    """A list: Muon for the blocks' matrices if it is chosen, and AdamW for the rest."""
    blocks, matrices, vectors = [], [], []
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trained:
        if p.dim() < 2:
            vectors.append(p)
        elif config.optimizer == "muon" and name.startswith("layers."):
            blocks.append(p)
        else:
            matrices.append(p)
    decay = config.weight_decay
    groups = [dict(params=matrices, weight_decay=decay), dict(params=vectors, weight_decay=0.0)]
    lr, betas = config.learning_rate, (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr, betas, fused=True)
    if not blocks:
        return [adamw]
    # match_rms_adamw makes updates as large as AdamW's, so that both take the same learning rate
    muon = torch.optim.Muon(blocks, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


# -- one step, one evaluation ----------------------------------------------------------------------

def backward(forward, batches, runtime):
    """Adds the gradient of the step's mean loss to .grad. Returns this rank's part of that loss.

    Each micro-step divides its sum by (targets of the whole step / ranks): micro-steps may differ
    in their numbers of targets, and DDP and FSDP average gradients over ranks.
    """
    n_targets = distributed.sum_over_ranks(sum(int((batch.y >= 0).sum()) for batch in batches))
    divisor = (n_targets.clamp(min=1) / runtime.ranks).to(runtime.device)
    loss = torch.zeros((), device=runtime.device)
    for batch in batches:
        if batch.seeds is not None:
            dropout.set_seeds(runtime.tensor(batch.seeds))
        x, y = runtime.tensor(batch.x), runtime.tensor(batch.y)
        with distributed.synchronizing(forward, batch is batches[-1]):
            with runtime.autocast():
                micro_loss = forward(x, y, divisor, logits="none")[1]
            micro_loss.backward()
        loss += micro_loss.detach()
    return loss / runtime.ranks


def update(model, optimizers, grad_clip):
    """Clips the gradient and, if its norm is finite, updates the weights: all ranks hold the same
    averaged gradient and decide alike. Clears .grad. Returns the norm before clipping, a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    norm = distributed.whole(norm).item()  # waits for the device
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def evaluate(forward, batches, runtime):
    """Metrics over the validation windows, equal on any number of ranks: see Dataset.metrics."""
    total = torch.zeros(3, dtype=torch.float64)  # sum of losses, right answers, targets
    forward.eval()
    for x, y in batches.validation():
        x, y = runtime.tensor(x), runtime.tensor(y)
        with runtime.autocast():
            logits, loss = forward(x, y, logits=batches.dataset.eval_logits)
        n_targets = int((y >= 0).sum())
        sums = [loss.item() * n_targets, n_right(logits, y), n_targets]
        total += torch.tensor(sums, dtype=torch.float64)
    forward.train()
    total = distributed.sum_over_ranks(total)
    val_loss, val_acc, _ = (total / total[2]).tolist()
    return batches.dataset.metrics(val_loss, val_acc)


def check_finite(finite, what, step, config, runtime):
    """Raises UserError unless finite, so that invalid weights are never saved."""
    if not finite:
        lr, dtype = learning_rate(max(0, step - 1), config), runtime.describe()["dtype"]
        raise UserError(f"the {what} at step {step} is not finite (lr {lr:.2e}, {dtype}): "
                        f"{folder.way_back(config.out_dir, step)}")


# -- the run ---------------------------------------------------------------------------------------

@program(remedy="lower batch_size (tokens_per_step may stay) or block_size")
def main(argv):
    given = parse(TrainConfig, argv, __doc__)
    with terminal.tolerant_output(), distributed.process_group(), ExitStack() as stack:
        train(given, stack)


def train(given, stack):
    """The whole run, in time order. What is entered on stack is closed when it ends."""
    # an existing folder is locked before its checkpoint is read: another run may be writing it
    locked = folder.lock_existing(resume.call_settings(given, TrainConfig), stack)

    # settings, data, device: all is checked before anything is written
    config, state = resume.config_and_state(given, TrainConfig, GPTConfig)
    prepare_default(config.dataset, distributed.world().local_rank)
    dataset = Dataset(config.dataset)
    config.vocab_size = config.vocab_size or dataset.meta["vocab_size"]
    resume.check_start(GPT, GPTConfig, config, state, dataset)
    runtime = pick_runtime(config.device, config.dtype, not config.eval_only and config.compile)
    batches = Batches(dataset, config, runtime)
    resume.verify_data(config, dataset)
    if not config.eval_only:
        folder.open_folder(config.out_dir, locked, stack)

    # model and optimizers: the plain model owns the weights and is saved, torch.compile wraps it,
    # and DDP wraps that; FSDP instead splits the plain model
    keep_freed_memory()
    model = make_model(config, state, runtime)
    optimizers = make_optimizers(model, config)
    checkpoint.restore(config, state, model, optimizers)
    compiled = model
    if config.parallel != "fsdp":
        first = batches.training(0)[:1]
        compiled = compile_model(model, runtime, lambda f: backward(f, first, runtime))
        model.zero_grad(set_to_none=True)  # compiling runs a backward pass
    forward = distributed.replicate(compiled, config)
    settings = resume.run_settings(config, GPTConfig)
    terminal.announce(config, model, batches, runtime)
    if config.init_from == "resume":
        terminal.announce_resume(state, settings, runtime)
    if config.eval_only:
        terminal.say(terminal.result(evaluate(compiled, batches, runtime)))
        return

    # what the loop keeps
    start, first_new = resume.steps_done(config, state), resume.first_new_step(config, state)
    stop = stack.enter_context(distributed.StopSignal())
    logger = stack.enter_context(log.Log(config, first_new - 1))
    # deletes what this run replaces, so only once wandb has started
    saver = take_over(config, state, dataset, runtime.rank)
    stack.callback(saver.wait)  # if the run ends in an error, what is being written is finished
    times, rate = timing.Times(runtime), timing.Rate(config.tokens_per_step, start)
    loss = grad_norm = None  # of the step before; None before the first one of this run
    skipped = in_a_row = 0  # steps without a finite gradient: since the last log line, in a row

    for step in range(start, config.max_steps + 1):  # optimizer steps done so far
        last = step == config.max_steps
        stop_signal = stop.agreed(runtime)  # its number; 0: go on
        new = step >= first_new  # False for the first step of a resumed run, logged already
        evaluating = new and (last or step % config.eval_interval == 0)
        saving = evaluating or (new and config.save_interval and step % config.save_interval == 0)
        logging = new and (saving or step % config.log_interval == 0)

        metrics = dict.fromkeys(dataset.metric_names)  # None in rows without an evaluation
        if logging:
            train_loss = None if loss is None else distributed.sum_over_ranks(loss).item()
            tokens_per_sec = rate.at(step)  # after .item(), which waits for the device
            if evaluating:
                metrics = evaluate(compiled, batches, runtime)
                val_loss = metrics["val_loss"]
                check_finite(math.isfinite(val_loss), "validation loss", step, config, runtime)
            logger.row(
                step=step, tokens=step * config.tokens_per_step, train_loss=train_loss, **metrics,
                lr=learning_rate(step - 1, config) if step else None,
                grad_norm=grad_norm, skipped=skipped, tokens_per_sec=tokens_per_sec,
                mfu=mfu(tokens_per_sec, model, runtime))
            skipped = 0
        if saving or (stop_signal and new) or (logging and saver.failed):  # failed: try again
            weights = map(distributed.local, model.parameters())
            check_finite(all(p.isfinite().all() for p in weights), "model", step, config, runtime)
            saver.save(dict(
                model=model.state_dict(), config=asdict(model.config),
                optimizer=checkpoint.moments(model, optimizers), settings=settings,
                runtime=runtime.describe(), step=step, val_loss=metrics["val_loss"],
                tokenizer=dataset.meta["tokenizer"], dataset_sha256=dataset.meta["sha256"]), last)
        if logging:
            rate.restart(step)
            times.lap("evaluation, log and checkpoints")
        if last or stop_signal:
            break

        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
        micro_batches = batches.training(step)
        times.lap("data")
        loss = backward(forward, micro_batches, runtime)
        times.lap("forward and backward")
        grad_norm = update(model, optimizers, config.grad_clip)
        if math.isfinite(grad_norm):
            in_a_row = 0
        else:
            in_a_row += 1
            skipped += 1
        check_finite(in_a_row < checkpoint.MAX_SKIPS, f"{checkpoint.MAX_SKIPS}th gradient in a row",
                     step + 1, config, runtime)
        times.lap("optimizer")
        logger.advance(step + 1)

    saver.check_written()
    logger.check_written()
    if stop_signal and not last:
        logger.print(f"stopped by {signal.Signals(stop_signal).name} after step {step} and saved: "
                     "the same command with --init_from=resume continues")
        raise SystemExit(128 + stop_signal)
    if not new:  # resumed where it had ended
        metrics = dataset.metrics(state["val_loss"])
    logger.print(f"done in {rate.elapsed()}: {terminal.result(metrics)}")
    logger.print(f"time: {times}\n{terminal.next_command(config, dataset)}")


if __name__ == "__main__":
    distributed.run_and_exit(main)
