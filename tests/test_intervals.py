"""Student's, Welch's and Holm's numbers: published ones, those of scipy, and what intervals cover."""

import random

import pytest
from scipy import stats

from experiments.intervals import MARGIN, Estimate, holm, one_sample, student, welch

# hours of sleep gained with two drugs: Student, The probable error of a mean, Biometrika 6 (1908)
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_interval_of_the_sleep_data():
    """As R's t.test prints them: t = 1.3257 and 3.6799, 9 degrees of freedom."""
    got = student(SLEEP_1)
    assert got.freedom == 9 and got.mean / got.error == pytest.approx(1.3257, abs=1e-4)
    assert got.interval() == pytest.approx([-0.5297804, 2.0297804], abs=1e-6)
    assert got.p == pytest.approx(0.2176, abs=1e-4)
    assert student(SLEEP_2).interval() == pytest.approx([0.8976775, 3.7623225], abs=1e-6)
    assert student(SLEEP_2).p == pytest.approx(0.005076, abs=1e-6)


def test_welchs_difference_of_the_sleep_data():
    """R's example: t = -1.8608, df = 17.776, p = 0.07939, [-3.3654832, 0.2054832]."""
    got = welch(SLEEP_1, SLEEP_2)
    assert got.mean == pytest.approx(-1.58) and got.mean / got.error == pytest.approx(-1.8608, abs=1e-4)
    assert got.freedom == pytest.approx(17.776, abs=1e-3)
    assert got.p == pytest.approx(0.07939, abs=1e-5)
    assert got.interval() == pytest.approx([-3.3654832, 0.2054832], abs=1e-6)


def test_by_hand():
    """Of 1, 2, 3, 4, 5 the mean is 3, the standard error sqrt(2.5 / 5), the 97.5 % point of t(4) 2.776."""
    assert student([1, 2, 3, 4, 5]).interval() == pytest.approx([3 - 1.963, 3 + 1.963], abs=1e-3)
    assert one_sample([1, 2, 3, 4, 5], 2).interval() == pytest.approx([1 - 1.963, 1 + 1.963], abs=1e-3)
    assert one_sample([1, 2, 3, 4, 5], 3).p == 1


@pytest.mark.parametrize("sizes", [(5, 5), (5, 10), (2, 10)])
def test_as_scipy(sizes):
    generator = random.Random(0)
    a, b = ([generator.gauss(0, 1 + i) for _ in range(n)] for i, n in enumerate(sizes))
    got, want = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    assert (got.p, got.freedom) == pytest.approx((want.pvalue, want.df))
    assert got.interval(0.9) == pytest.approx([*want.confidence_interval(0.9)])
    want = stats.ttest_1samp(a, 0.3)
    assert one_sample(a, 0.3).p == pytest.approx(want.pvalue)
    assert one_sample(a, 0.3).mean == pytest.approx(student(a).mean - 0.3)


def test_what_does_not_vary():
    assert welch([0.5, 0.5], [0.5, 0.5, 0.5]).p == 1
    got = welch([0.6, 0.6], [0.5, 0.5, 0.5])
    assert got.p == 0 and got.interval() == pytest.approx([0.1, 0.1])
    assert one_sample([0.5, 0.5], 0.4).p == 0
    one_side = welch([0.5, 0.5], [0.1, 0.3])  # one of them varies
    assert one_side.freedom == pytest.approx(1)


def test_a_single_number_has_no_interval():
    with pytest.raises(ValueError):
        student([0.5])


def test_holm():
    """Of .01, .04, .03, .005 the factors are 3, 1, 2, 4, and none falls below one that is smaller."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04]) == [0.04] and holm([]) == []
    assert holm([0.6, 0.7]) == [1, 1]


def test_equivalence_is_the_90_percent_interval_within_the_margin():
    """t(4) has its 95 % point at 2.132: with a standard error of .005 the half width is .01066."""
    assert Estimate(0.009, 0.005, 4).is_equivalent and Estimate(-0.009, 0.005, 4).is_equivalent
    assert not Estimate(0.010, 0.005, 4).is_equivalent and not Estimate(-0.010, 0.005, 4).is_equivalent
    low, high = Estimate(0.009, 0.005, 4).interval()
    assert high > MARGIN  # the 95 % interval is not


def covered(intervals, truth):
    inside = [low <= truth <= high for low, high in intervals]
    return sum(inside) / len(inside)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Seeds are drawn from normal distributions of unequal variances; 3,000 studies, standard error .004."""
    generator = random.Random(0)
    draw = lambda n, middle, spread: [generator.gauss(middle, spread) for _ in range(n)]  # noqa: E731
    studies = [(draw(5, 0.9, 0.01), draw(10, 0.7, 0.05)) for _ in range(3000)]
    assert covered([student(a).interval() for a, _ in studies], 0.9) == pytest.approx(0.95, abs=0.012)
    assert covered([student(a).interval(0.9) for a, _ in studies], 0.9) == pytest.approx(0.9, abs=0.017)
    assert covered([welch(a, b).interval() for a, b in studies], 0.2) == pytest.approx(0.95, abs=0.012)


def test_holm_keeps_the_share_of_families_with_a_false_alarm():
    """Four comparisons without a difference: without the correction 18.5 % of the families had one."""
    generator = random.Random(1)
    families = [[generator.random() for _ in range(4)] for _ in range(4000)]
    assert sum(min(ps) < 0.05 for ps in families) / 4000 > 0.17
    assert sum(min(holm(ps)) < 0.05 for ps in families) / 4000 == pytest.approx(0.05, abs=0.011)
