"""Published differences in loss between MHA, GQA, MQA and MLA, with their sources."""
import math
from dataclasses import dataclass


@dataclass
class Published:
    """Validation perplexities of models that differ in attention, each trained with one seed."""
    paper: str
    url: str
    table: str
    params: int                   # of the model with MHA
    tokens: int                   # of training
    matched: bool                 # whether the MLP is widened to equal parameters
    perplexity: dict              # {variant: perplexity per token}

    def difference(self, variant):
        """Loss of variant minus that of MHA, nats per token."""
        return math.log(self.perplexity[variant] / self.perplexity["MHA"])

    def relative_difference(self, variant):
        """The difference as a share of the loss of MHA: it is the same per token and per byte."""
        return self.difference(variant) / math.log(self.perplexity["MHA"])


VARIANTS = ("GQA-4", "MQA", "MLA")  # each is compared with MHA
ZADOURI = ("Zadouri et al. 2025", "https://arxiv.org/abs/2505.21487")  # FineWeb-Edu
PUBLISHED = [
    Published(*ZADOURI, "table 2", 183_000_000, 25 * 10**9, True,
              {"MHA": 16.715, "GQA-4": 16.578, "MQA": 16.972, "MLA": 16.318}),
    # table 2 prints 12.922 for GQA-4, which table 12 gives to another variant
    Published(*ZADOURI, "tables 2 and 12", 433_000_000, 50 * 10**9, True,
              {"MHA": 12.979, "GQA-4": 12.845, "MQA": 13.068, "MLA": 12.561}),
    Published(*ZADOURI, "table 2", 876_000_000, 50 * 10**9, True,
              {"MHA": 11.501, "GQA-4": 11.340, "MQA": 11.413, "MLA": 11.363}),
    Published(*ZADOURI, "table 2", 1_470_000_000, 50 * 10**9, True,
              {"MHA": 10.311, "GQA-4": 10.202, "MLA": 10.256}),
    Published(*ZADOURI, "table 18", 183_000_000, 25 * 10**9, False,
              {"MHA": 16.71, "GQA-4": 17.07, "MQA": 17.39, "MLA": 16.40}),
]


def relative_differences(variant):
    """The size of every published difference of variant, as a share of the loss of MHA."""
    sizes = []
    for row in PUBLISHED:
        if variant in row.perplexity:
            sizes.append(abs(row.relative_difference(variant)))
    return sizes
