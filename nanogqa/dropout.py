"""Dropout that depends on the sequence alone, however a step is cut into micro-batches and ranks.

nn.Dropout draws from one stream of random numbers, so that a sequence's mask depends on what was
drawn before. Here a mask is a hash of the sequence's seed, the number of the dropout in the model
and the place in the (T, C) matrix. No random state exists that a resumed run or a recomputed block
would have to restore.
"""
import torch
from torch import nn

MASK32 = 2**32 - 1  # numbers of 32 bits in int64: their products with 31 bits never overflow


class Seeds:
    """The seeds of the sequences of the current forward pass, (B,) int64 on the device."""
    now = None


SEEDS = Seeds()  # of the process, as torch has one default generator


def set_seeds(seeds):
    """Sets the seeds of the next forward passes: (B,) int64, at least 0, one for each sequence."""
    SEEDS.now = seeds


def by_sequence(model):
    """Replaces each nn.Dropout in model by SequenceDropout; returns model."""
    number = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, SequenceDropout(child.p, number))
                number += 1
    return model


class SequenceDropout(nn.Module):
    """nn.Dropout of (B, ..., C) whose mask depends on the sequence's seed and on the number of this
    module among the model's dropouts."""

    def __init__(self, p, number):
        super().__init__()
        self.p, self.number = p, number

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        rows = x[0].numel() // x.size(-1)
        dropped = mask(SEEDS.now, self.number, rows, x.size(-1), self.p).view_as(x)
        return x.masked_fill(dropped, 0.0) * (1 / (1 - self.p))


def mask(seeds, number, T, C, p):
    """(B, T, C) bool, True with probability p: a hash of the seeds (B,), the number and the place.

    Each row of C numbers has two keys, and each of its numbers goes through two rounds of a hash.
    """
    steps = torch.arange(max(T, C), device=seeds.device)
    key = mixed((seeds & MASK32) ^ mixed(number + 1))[:, None]           # (B, 1)
    first = mixed(key ^ mixed(steps[:T]))                               # (B, T)
    second = mixed(first ^ (seeds >> 32)[:, None])                      # (B, T)
    x = first[:, :, None] ^ mixed(steps[:C])                            # (B, T, C)
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= MASK32
    x ^= second[:, :, None]
    x ^= x >> 15
    x *= 0x2C1B3C6D
    x &= MASK32
    return x < round(p * 2**32)


def mixed(x):
    """A bijective hash of numbers below 2^32: lowbias32 of Chris Wellons, in 64 bits, with a
    multiplier below 2^31 in its second round."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x2C1B3C6D) & MASK32
    return x ^ (x >> 16)
