"""Intervals and tests of few independent numbers, such as one for each seed.

An estimate is a mean with its standard error and degrees of freedom; its interval and its p value are
those of Student's t. Two samples are compared as by Welch, whose variances may differ. Where nothing varies
the standard error is 0: the interval is a point, and p is 1 for a difference of 0 and 0 for any other.
"""

from dataclasses import dataclass
from math import sqrt
from statistics import mean, variance

from scipy.special import stdtr, stdtrit  # Student's t: its distribution function and its quantiles

MARGIN = 0.02  # two rows whose difference is smaller are called equivalent


@dataclass(frozen=True)
class Estimate:
    mean: float
    error: float  # standard error of the mean
    freedom: float  # degrees of freedom

    def interval(self, level=0.95):
        half = float(stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self):
        """Two-sided, of the hypothesis that the mean is 0."""
        if not self.error:
            return float(self.mean == 0)
        return float(2 * stdtr(self.freedom, -abs(self.mean) / self.error))

    @property
    def is_equivalent(self):
        """Two one-sided tests at 5 % say that the mean is within the margin: the 90 % interval is."""
        low, high = self.interval(0.90)
        return -MARGIN <= low and high <= MARGIN


def student(values):
    """The mean of at least two numbers."""
    return Estimate(mean(values), sqrt(variance(values) / len(values)), len(values) - 1)


def one_sample(values, number):
    """The mean of the values minus a number without an error of its own."""
    own = student(values)
    return Estimate(own.mean - number, own.error, own.freedom)


def welch(a, b):
    """The mean of a minus the mean of b, two independent samples."""
    x, y = student(a), student(b)
    error = sqrt(x.error**2 + y.error**2)
    if not error:
        return Estimate(x.mean - y.mean, 0.0, x.freedom + y.freedom)
    freedom = error**4 / (x.error**4 / x.freedom + y.error**4 / y.freedom)
    return Estimate(x.mean - y.mean, error, freedom)


def holm(values):
    """p values, corrected for their number as by Holm (1979), in their order."""
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, (len(values) - rank) * values[i])
        corrected[i] = min(1.0, largest)
    return corrected
