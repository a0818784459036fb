"""The batches of a run: which sequences each rank reads at each step."""
from dataclasses import dataclass

import numpy as np

from nanogqa.configurator import UserError
from nanogqa.dataloader import hashed, train_batch, val_batch, val_windows


@dataclass
class MicroBatch:
    """The sequences of one forward pass."""
    x: np.ndarray  # (batch_size, block_size) int64 token ids
    y: np.ndarray  # their targets, -1 where there is none
    seeds: np.ndarray | None  # of dropout, (batch_size,) int64; None: there is no dropout


class Batches:
    """Training and validation batches of this rank.

    Sequences and dropout depend only on the seed, the step and the place in the global batch, so
    they do not change with the number of ranks or when a run resumes. Ranks take micro-batches in
    turn.
    """

    def __init__(self, dataset, config, runtime):
        self.dataset = dataset
        self.config = config
        self.rank, self.ranks = runtime.rank, runtime.ranks
        self.batch_size, self.micro_steps = batch_shape(config, runtime.ranks)

    def training(self, step):
        """The MicroBatches of a training step."""
        config = self.config
        batches = []
        for micro_step in range(self.micro_steps):
            place = micro_step * self.ranks + self.rank
            first = (step * self.micro_steps * self.ranks + place) * self.batch_size
            x, y = train_batch(
                self.dataset.train, config.seed, first, self.batch_size, config.block_size)
            seeds = dropout_seeds(config, first, self.batch_size)
            batches.append(MicroBatch(x, y, seeds))
        return batches

    def validation(self):
        """(inputs, targets) of the fixed validation windows; past the end, targets are -1."""
        val, block_size = self.dataset.val, self.config.block_size
        starts = val_windows(val, block_size, self.config.eval_tokens)
        # as many batches on each rank: the ranks of an FSDP model must run forward together
        for start in range(0, len(starts), self.ranks * self.batch_size):
            first = start + self.rank * self.batch_size
            chosen = starts[first:first + self.batch_size]
            yield val_batch(val, chosen, self.batch_size, block_size)


def n_right(logits, targets):
    """The number of targets that the model finds likeliest: logits are (n, V), one row for each of
    the n targets that are not -1. None gives 0, which Dataset.metrics leaves out."""
    if logits is None:
        return 0
    return int((logits.argmax(-1) == targets[targets >= 0]).sum())


def dropout_seeds(config, first, count):
    """The seeds of sequences first to first + count - 1 of a run for nanogqa/dropout.py, (count,)
    int64; None where there is no dropout."""
    if config.dropout == 0:
        return None
    return np.array([hashed(config.seed, first + i, "dropout") for i in range(count)])


def batch_shape(config, ranks):
    """(batch_size, micro_steps) of each rank: sequences per forward pass, passes per step."""
    unit = ranks * config.block_size
    name, remedy = f"{ranks} ranks x block_size {config.block_size}", ""
    if config.batch_size is not None:
        unit *= config.batch_size
        name, remedy = f"batch_size {config.batch_size} x {name}", ", or choose another batch_size"
    try:
        check_multiple(config.tokens_per_step, unit, f"{name} = {unit}")
    except ValueError as error:
        raise UserError(f"{error}{remedy}") from None
    sequences = config.tokens_per_step // (ranks * config.block_size)  # of a rank in a step
    batch_size = config.batch_size or sequences
    return batch_size, sequences // batch_size


def check_multiple(tokens_per_step, unit, name):
    """Raises ValueError unless tokens_per_step is a multiple of unit, whose name is printed."""
    if tokens_per_step % unit:
        below = tokens_per_step // unit * unit
        nearest = f"{below} or {below + unit}"
        if below == 0:
            nearest = f"{unit}"
        raise ValueError(f"tokens_per_step={tokens_per_step} is not a multiple of {name}: "
                         f"the nearest is {nearest}")
