"""Statistics of a comparison: means over seeds, paired differences, their intervals."""
import itertools
import math
import statistics
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over seeds and its error; None where one seed gives no error."""
    mean: float
    error: float | None           # standard error, or half the width of a 95 % interval

    def text(self, sign=""):
        text = f"{self.mean:{sign}.4f}"
        if self.error is not None:
            text += f" ± {self.error:.4f}"
        return text


def student_t(df, p=0.975):
    """The p quantile of Student's t with df degrees of freedom.

    Bisects the closed form of the distribution function.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if two_sided_probability(middle, df) < 2 * p - 1:
            low = middle
        else:
            high = middle
    return low


def two_sided_probability(t, df):
    """P(|T| < t) of Student's t with df degrees of freedom.

    Abramowitz and Stegun 1964: 26.7.3 for odd df, 26.7.4 for even df.
    """
    theta = math.atan(t / math.sqrt(df))
    odd = df % 2 == 1
    term = 1.0
    if odd:
        term = math.cos(theta)
    total = 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def mean_over_seeds(values):
    """The mean of values and its standard error."""
    if len(values) < 2:
        return Estimate(statistics.mean(values), None)
    return Estimate(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))


def paired(values, reference):
    """The mean of values - reference and half the width of its 95 % interval.

    Both lists are ordered by seed: the difference is taken within each seed.
    """
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    mean, standard_error = mean_over_seeds(differences)
    if standard_error is None:
        return Estimate(mean, None)
    return Estimate(mean, student_t(len(differences) - 1) * standard_error)


def steps_to(curve, loss):
    """The step at which a curve of (step, loss) points first falls to loss; None if it never does.

    The curve is interpolated linearly between its points.
    """
    for (step, before), (next_step, after) in itertools.pairwise(curve):
        if before > loss >= after:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None


def verdict(mean, half):
    """What a difference in loss, with half the width of its interval, says of a variant."""
    if half is None:
        return "one seed: no error bar"
    if abs(mean) <= half:
        return "not distinguishable"
    if mean < 0:
        return "better"
    return "worse"
