"""Statistics of a comparison: means over seeds, paired differences, what they can resolve.

Each variant is compared to the first one, and every difference has its own variance: the runs of
two similar models share more of their noise. That is why the intervals are not Dunnett's, which
assume one variance. Two procedures account for the number of comparisons, and both hold however
the comparisons depend on each other, as they do since they share the first variant:

- Holm's test decides the verdicts (Holm 1979, Scandinavian Journal of Statistics 6). With a chance
  of at least 95 %, no difference is found where there is none.
- Bonferroni's intervals hold all together with at least 95 %. Holm's test has no two-sided
  intervals of its own; these are the usual ones beside it. Where one of them excludes zero, Holm's
  test of Student's p values finds the difference; it may also find one whose interval contains
  zero.

The p values are those of Student's t test. Where the loss counts answers, seeds may form groups,
those that learn the task and those that do not: then they are those of an exact test of ranks.
"""
import bisect
import functools
import itertools
import math
import statistics
from typing import NamedTuple

ALPHA = 0.05  # accepted chance of a difference that is found where there is none
POWER = 0.8  # chance with which a detectable difference is found
POINTS = 1000  # of the integral in power


class Estimate(NamedTuple):
    """A mean over seeds and its standard error; None where one seed gives no error."""
    mean: float
    error: float | None

    def text(self):
        return with_error(f"{self.mean:.4f}", self.error)


class Difference(NamedTuple):
    """The mean difference of a variant's losses to the first variant's, paired by seed.

    One seed gives the mean alone; the rest is None.
    """
    mean: float
    half: float | None = None           # half the width of its 95 % interval
    half_together: float | None = None  # of one that holds together with all others
    p: float | None = None              # of the two-sided t test, or of the test of ranks
    p_holm: float | None = None         # the same, adjusted for the number of comparisons
    detectable: float | None = None     # t: estimated true difference found with 80 % power
    lower: bool | None = None           # ranks: whether its losses are the lower ones
    findable: bool = False              # whether so many seeds could show any difference at all

    def text(self, digits=4):
        return with_error(f"{self.mean:+.{digits}f}", self.half, digits)

    @property
    def found(self):
        """Whether the difference is distinguishable from chance."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def verdict(self):
        """What the difference says of the variant, as text."""
        if self.p_holm is None:
            return "one seed: no error bar"
        if not self.found:
            return "not distinguishable"
        lower = self.lower
        if lower is None:
            lower = self.mean < 0
        if lower:
            return "better"
        return "worse"


def with_error(text, error, digits=4):
    if error is None:
        return text
    return f"{text} ± {error:.{digits}f}"


# -- distributions ---------------------------------------------------------------------------------

@functools.cache
def student_t(df, p=0.975):
    """The p quantile of Student's t with df degrees of freedom, for p of 0.5 or more.

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
    first, term = 2, 1.0
    if odd:
        first, term = 3, math.cos(theta)
    total = 0.0
    for k in range(first, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def power(noncentrality, df, threshold):
    """P(T > threshold) of the noncentral t with df degrees of freedom.

    T is (Z + noncentrality) / S, where Z is standard normal and S the estimated standard deviation
    of data with deviation 1. The sum is an integral over S by the midpoint rule.
    """
    width = (1 + 9 / math.sqrt(2 * df)) / POINTS  # beyond, S has no mass
    log_scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    total = 0.0
    for k in range(POINTS):
        s = (k + 0.5) * width
        density = math.exp(log_scale + (df - 1) * math.log(s) - df * s * s / 2)
        total += density * normal_probability(noncentrality - threshold * s)
    return total * width


def normal_probability(z):
    """P(Z < z) of the standard normal distribution."""
    return math.erfc(-z / math.sqrt(2)) / 2


@functools.cache
def detectable(df, alpha):
    """The true difference, in standard errors, that a two-sided t test at level alpha finds with a
    chance of POWER.

    The unit is the true standard error, and the test's use of the sample's is taken into account.
    So a multiple of the sample's is an estimate. The usual sum of the quantiles
    1 - alpha / 2 and POWER of Student's t is 2 % less with four seeds, and 14 % less with two.
    """
    threshold = student_t(df, 1 - alpha / 2)
    low, high = 0.0, 2.0
    while power(high, df, threshold) < POWER:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if power(middle, df, threshold) < POWER:
            low = middle
        else:
            high = middle
    return low


# -- means and differences -------------------------------------------------------------------------

def mean_over_seeds(values):
    """The mean of values and its standard error."""
    if len(values) < 2:
        return Estimate(statistics.mean(values), None)
    return Estimate(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))


def paired(values, reference):
    """values - reference for each seed: both lists are ordered by seed."""
    return [value - other for value, other in zip(values, reference, strict=True)]


def estimate_differences(samples, by_ranks=False):
    """{name: Difference} of {name: (losses, losses of the first variant)}, ordered by seed.

    The names are the comparisons of one report; each has as many seeds as the others. by_ranks
    selects the test.
    """
    alpha = ALPHA / max(1, len(samples))
    differences = {}
    for name, (values, reference) in samples.items():
        mean, error = mean_over_seeds(paired(values, reference))
        df = len(values) - 1
        if error is None:
            differences[name] = Difference(mean)
            continue
        difference = Difference(
            mean,
            half=student_t(df) * error,
            half_together=student_t(df, 1 - alpha / 2) * error,
        )
        if by_ranks:
            p, lower = rank_test(values, reference)
            findable = smallest_p(len(values)) < alpha
            difference = difference._replace(p=p, lower=lower, findable=findable)
        else:
            p = p_value(Estimate(mean, error), df)
            least = detectable(df, alpha) * error
            difference = difference._replace(p=p, detectable=least, findable=True)
        differences[name] = difference
    p_values = {name: one.p for name, one in differences.items() if one.p is not None}
    for name, adjusted in holm(p_values).items():
        differences[name] = differences[name]._replace(p_holm=adjusted)
    return differences


def rank_test(values, reference):
    """(p, lower): the exact two-sided p value of the test of Wilcoxon, Mann and Whitney, and
    whether values are lower (Mann and Whitney 1947, Annals of Mathematical Statistics 18).

    p is the share of all ways to choose len(values) of all losses together whose sum of ranks is at
    least as far from the mean sum. Equal losses share the mean of their ranks. All values count as
    independent: the test is cautious if pairs resemble each other, and not exact if they are
    opposed.
    """
    ranks = doubled_ranks([*values, *reference])
    n = len(values)
    ways = [{0: 1}] + [{} for _ in values]  # ways[k][s]: choices of k ranks with the sum s
    for rank in ranks:
        for k in range(n, 0, -1):
            for total, count in ways[k - 1].items():
                ways[k][total + rank] = ways[k].get(total + rank, 0) + count
    middle = n * (len(ranks) + 1)
    distance = sum(ranks[:n]) - middle
    as_far = 0
    for total, count in ways[n].items():
        if abs(total - middle) >= abs(distance):
            as_far += count
    return as_far / math.comb(len(ranks), n), distance < 0


def doubled_ranks(values):
    """Twice the rank of each value, from 2 for the smallest: whole numbers also for equal values.
    """
    ordered = sorted(values)
    return [bisect.bisect_left(ordered, x) + bisect.bisect_right(ordered, x) + 1 for x in values]


def smallest_p(n):
    """The smallest p value that rank_test can give with n seeds."""
    return 2 / math.comb(2 * n, n)


def p_value(estimate, df):
    """The chance of a mean at least as far from zero, if the true one is zero: Student's t test."""
    if estimate.error == 0:
        return float(estimate.mean == 0)
    return 1 - two_sided_probability(abs(estimate.mean / estimate.error), df)


def holm(p_values):
    """The p values of a dict, adjusted by Holm's step-down method: each may be compared to ALPHA.

    The smallest is multiplied by their number, the next one by one less, and so on; none becomes
    smaller than the one before it.
    """
    adjusted = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def steps_to(curve, loss):
    """The step at which a curve of (step, loss) points first falls to loss; None if it never does.

    The curve is interpolated linearly between its points.
    """
    first_step, first_loss = curve[0]
    if first_loss <= loss:
        return first_step
    for (step, before), (next_step, after) in itertools.pairwise(curve):
        if before > loss >= after:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None
