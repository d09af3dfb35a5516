"""The comparisons' statistics, against scipy, against brute force and by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gradloc.compare.statistics import (
    bootstrap_ci,
    difference_from_zero,
    mean_sd,
    paired_difference,
    permutation_p_between_groups,
    ranks,
    sign_flip_p,
    spearman,
    student_t,
)
from gradloc.report.frontier import (
    dominated_area,
    floor_of_frontier,
    interpolate_on_frontier,
    mean_gap,
    pareto,
)


@pytest.fixture
def draw():
    return np.random.default_rng(7)


@pytest.mark.parametrize("degrees", [*range(1, 12), 29, 30, 99, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_student_t_is_scipys(degrees, confidence):
    expected = stats.t.ppf((1 + confidence) / 2, degrees)
    assert student_t(degrees, confidence=confidence) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("degrees", "confidence"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_student_t_refuses(degrees, confidence):
    with pytest.raises(ValueError, match=f"degrees={degrees}"):
        student_t(degrees, confidence=confidence)


def test_mean_and_sd(draw):
    values = draw.normal(size=9)
    assert mean_sd(values) == pytest.approx((values.mean(), values.std(ddof=1)))
    mean, sd = mean_sd([3.0])
    assert (mean, math.isnan(sd)) == (3.0, True)
    with pytest.raises(ValueError, match="at least one"):
        mean_sd([])


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_a_paired_difference_is_scipys_paired_t(draw, count):
    a, b = draw.normal(1.0, 1.0, count), draw.normal(0.5, 1.0, count)
    found = paired_difference(a, b)
    judge = stats.ttest_rel(a, b)
    interval = judge.confidence_interval(0.95)
    assert found.ci95 == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(np.mean(a - b))
    assert found.sd == pytest.approx(np.std(a - b, ddof=1))
    assert found.differences == tuple(a - b)


def test_one_pair_says_nothing_about_chance():
    found = paired_difference([2.0], [5.0])
    assert (found.mean, found.sign_flip_p, found.direction) == (-3.0, 1.0, -1)
    assert all(map(math.isnan, (found.sd, *found.ci95)))


def test_pairs_must_match():
    with pytest.raises(ValueError, match=r"len\(a\)=1, len\(b\)=2"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [])


@pytest.mark.parametrize(
    ("differences", "direction"),
    [((1.0, 2.0), 1), ((-1.0, -0.5), -1), ((1.0, -1.0), 0), ((0.0, 1.0), 0), ((0.0, 0.0), 0)],
)
def test_the_direction_that_all_pairs_agree_on(differences, direction):
    assert difference_from_zero(differences).direction == direction


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_sign_flips_by_brute_force(draw, count):
    values = draw.normal(0.4, 1.0, count)
    means = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=count)
    ]
    expected = np.mean([mean >= abs(values.sum()) - 1e-9 for mean in means])
    assert sign_flip_p(values) == expected


def test_sign_flips_of_a_clear_difference_reach_the_least_p():
    assert sign_flip_p([0.3, 0.1, 0.2, 0.7, 0.4]) == 2 / 2**5
    assert sign_flip_p([-1.0] * 12) == 2 / 2**12
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_sign_flips_of_many_pairs_are_sampled(draw):
    values = draw.normal(0.5, 1.0, 20)
    judge = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=3
    ).pvalue
    assert sign_flip_p(values) == pytest.approx(judge, abs=0.01)
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p(np.ones(20)) == pytest.approx(1 / 10_001, abs=2e-4)


def test_ranks_and_spearman_are_scipys(draw):
    a, b = draw.normal(size=40), draw.normal(size=40)
    tied = draw.integers(0, 5, 40)
    assert ranks(tied) == pytest.approx(stats.rankdata(tied))
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(a, tied) == pytest.approx(stats.spearmanr(a, tied).statistic)
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert math.isnan(spearman(a, np.ones(40)))


def test_separate_groups_are_found(draw):
    shapes = {"updated": draw.normal(size=30), "new": draw.normal(size=30)}
    labels = ["updated", "new"] * 6
    profiles = [shapes[label] + 0.3 * draw.normal(size=30) for label in labels]
    found = permutation_p_between_groups(profiles, labels, num_permutations=999)
    # By hand from scipy's matrix of rank correlations.
    matrix = stats.spearmanr(np.asarray(profiles), axis=1).statistic
    pairs = list(itertools.combinations(range(12), 2))
    within = [matrix[i, j] for i, j in pairs if labels[i] == labels[j]]
    between = [matrix[i, j] for i, j in pairs if labels[i] != labels[j]]
    assert found.within == pytest.approx(np.mean(within))
    assert found.between == pytest.approx(np.mean(between))
    assert found.statistic == found.within - found.between > 0.3
    assert found.p < 0.01


def test_groups_that_are_one_are_seldom_separated(draw):
    labels = ["a"] * 5 + ["b"] * 5
    ps = [
        permutation_p_between_groups(
            draw.normal(size=(10, 12)), labels, num_permutations=199, seed=n
        ).p
        for n in range(100)
    ]
    assert np.mean(np.asarray(ps) <= 0.1) < 0.2
    assert 0.35 < np.mean(ps) < 0.65


@pytest.mark.parametrize(
    ("count", "labels"), [(3, ["a", "a"]), (2, ["a", "a"]), (2, ["a", "b"]), (0, [])]
)
def test_groups_that_cannot_be_compared(count, labels):
    with pytest.raises(ValueError, match="two groups"):
        permutation_p_between_groups(np.ones((count, 4)), labels)


def test_a_bootstrap_interval_is_scipys(draw):
    values = draw.gamma(2.0, size=60)
    judge = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=1
    ).confidence_interval
    assert bootstrap_ci(values) == pytest.approx((judge.low, judge.high), abs=0.04)
    assert bootstrap_ci(values) == bootstrap_ci(values)


def test_a_bootstrap_resamples_the_first_axis_only(draw):
    values = np.stack([draw.normal(size=30), np.full(30, 2.0)], axis=1)
    low, high = bootstrap_ci(values, num_samples=200)
    assert (low[1], high[1]) == (2.0, 2.0)
    assert low[0] < values[:, 0].mean() < high[0]
    narrow = bootstrap_ci(values[:, 0], np.median, confidence=0.5)
    wide = bootstrap_ci(values[:, 0], np.median, confidence=0.95)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_frontier_by_brute_force(draw):
    points = draw.integers(0, 12, size=(60, 2)).astype(float)
    best = sorted(
        {
            (x, y)
            for x, y in map(tuple, points)
            if not any((a <= x and b <= y) and (a, b) != (x, y) for a, b in points)
        }
    )
    assert pareto(points).tolist() == [list(point) for point in best]


def test_points_that_are_no_numbers_are_not_on_the_frontier():
    points = [(1.0, math.nan), (2.0, 3.0), (math.inf, 0.0), (math.nan, 0.0)]
    assert pareto(points).tolist() == [[2.0, 3.0]]
    assert pareto([]).shape == (0, 2)


def test_interpolation_goes_along_the_frontier_only():
    # (1.5, 9) is beaten by (1, 4): the line goes from (1, 4) to (3, 2) without it.
    points = [(3.0, 2.0), (1.0, 4.0), (1.5, 9.0)]
    assert interpolate_on_frontier(points, 1.0) == 4.0
    assert interpolate_on_frontier(points, 2.0) == 3.0
    assert interpolate_on_frontier(points, 3.0) == 2.0
    assert math.isnan(interpolate_on_frontier(points, 0.99))
    assert math.isnan(interpolate_on_frontier(points, 3.01))
    assert math.isnan(interpolate_on_frontier(points, math.nan))
    assert math.isnan(interpolate_on_frontier([], 1.0))
    assert interpolate_on_frontier([(1.0, 2.0)], 1.0) == 2.0


def test_the_dominated_area_by_counting(draw):
    points = draw.integers(0, 14, size=(8, 2)).astype(float)
    corner = (10.0, 9.0)
    # Unit squares whose lower left corner lies above and to the right of a point.
    covered = sum(any(x <= i and y <= j for x, y in points) for i in range(10) for j in range(9))
    assert dominated_area(points, corner) == covered
    assert dominated_area([(11.0, 0.0)], corner) == 0.0
    assert dominated_area([], corner) == 0.0


def falling_and_bowed(x, at=0.0):
    return 3 * np.exp(-0.8 * (x - at)) + 1 / (0.2 + x - at)


def test_such_a_curve_lies_between_the_floor_and_the_lines(draw):
    for count in (2, 3, 4, 7):
        known = np.sort(draw.uniform(0.1, 4.0, count))
        points = np.stack([known, falling_and_bowed(known)], axis=1)
        places = np.linspace(known[0], known[-1], 101)
        truth = falling_and_bowed(places)
        assert np.all(floor_of_frontier(points, places) <= truth + 1e-9)
        assert np.all(interpolate_on_frontier(points, places) >= truth - 1e-9)
        assert floor_of_frontier(points, known) == pytest.approx(points[:, 1])


def test_the_floor_by_hand():
    points = [(0.0, 8.0), (1.0, 4.0), (3.0, 2.0), (6.0, 1.0)]
    # In the middle stretch: the line on from the left gives 4 - 4 (x - 1), the one from the right
    # 2 + (3 - x) / 3, and the line between gives 5 - x.
    assert floor_of_frontier(points, 1.2) == pytest.approx(3.2)
    assert floor_of_frontier(points, 2.0) == pytest.approx(2 + 1 / 3)
    # With two points, nothing but that it falls.
    assert floor_of_frontier(points[:2], 0.5) == 4.0
    assert floor_of_frontier(points[:1], 0.0) == 8.0
    assert np.isnan(floor_of_frontier(points, [-0.1, 6.1])).all()
    # Where points bow the other way the line is the floor.
    assert floor_of_frontier([(0.0, 4.0), (1.0, 3.5), (2.0, 0.0)], 1.5) == pytest.approx(1.75)


def test_the_mean_gap_of_two_frontiers():
    lower = [(0.0, 4.0), (4.0, 0.0)]
    upper = [(1.0, 5.0), (6.0, 0.0)]
    gap = mean_gap(upper, lower)
    assert gap.straight == pytest.approx(2.0)
    assert gap.width == 3.0
    # Two points each: the floors are the right ends, and both lines are known.
    assert gap.highest == pytest.approx(np.mean([5.0, 2.0]))
    assert gap.lowest == pytest.approx(0.0 - 1.5)
    for apart in ([(5.0, 1.0), (7.0, 0.5)], [], [(0.0, 4.0)]):
        assert math.isnan(mean_gap(apart, lower).straight)
        assert mean_gap(apart, lower).width == 0.0


def test_sampling_two_curves_more_densely_closes_in_on_their_gap():
    widths = []
    for count in (3, 6, 12):
        places = np.linspace(0.5, 4.0, count)
        ours = np.stack([places, falling_and_bowed(places) + 0.3], axis=1)
        theirs = np.stack([places, falling_and_bowed(places)], axis=1)
        gap = mean_gap(ours, theirs)
        assert gap.lowest <= 0.3 <= gap.highest
        widths.append(gap.highest - gap.lowest)
    assert widths[0] > 3 * widths[1] > 6 * widths[2]
