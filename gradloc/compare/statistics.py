"""The statistics of comparisons: pairs over seeds, rank correlations, resampling.

Pure functions on arrays of numbers. What the numbers mean, and which differences are worth a
word, is decided by those who call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_EXACT_SIGNS = 12
"""Up to so many pairs every one of the 2^n sign patterns is tried."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How two things differ over pairs, a minus b.

    Attributes:
        mean: of the differences.
        sd: their sample standard deviation; nan for one pair.
        ci95: ends of the 95 % interval of the mean by Student's t; nan for one pair.
        sign_flip_p: two-sided p of `sign_flip_p`. With n pairs it is at least 2 / 2^n.
        differences: one a pair.
    """

    mean: float
    sd: float
    ci95: tuple[float, float]
    sign_flip_p: float
    differences: tuple[float, ...]

    @property
    def direction(self) -> int:
        """-1 or 1 where every pair has that sign, else 0."""
        signs = {int(np.sign(one)) for one in self.differences}
        return signs.pop() if len(signs) == 1 else 0


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is nan for a single value.

    Raises:
        ValueError: there are no values.
    """
    if len(values) == 0:
        raise ValueError("values=[]: a mean needs at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """Compare pairs, such as two methods on the same seeds.

    Args:
        a: one value a pair.
        b: the value to compare with, of the same pair.

    Returns:
        The difference a - b.

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"len(a)={len(a)}, len(b)={len(b)}: give as many of both, at least one")
    return difference_from_zero([one - other for one, other in zip(a, b, strict=True)])


def difference_from_zero(differences: Sequence[float]) -> PairedDifference:
    """The same for differences that are already taken; see `paired_difference`."""
    mean, sd = mean_sd(differences)
    count = len(differences)
    half = math.nan if count == 1 else student_t(count - 1) * sd / math.sqrt(count)
    return PairedDifference(
        mean=mean,
        sd=sd,
        ci95=(mean - half, mean + half),
        sign_flip_p=sign_flip_p(differences),
        differences=tuple(differences),
    )


def student_t(degrees: int, *, confidence: float = 0.95) -> float:
    """The t for which P(|T| < t) = `confidence`, for a whole number of degrees of freedom.

    By bisection on the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Raises:
        ValueError: `degrees` is below 1, or `confidence` not between 0 and 1.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"degrees={degrees}, confidence={confidence}: give 1 or more, and between 0 and 1"
        )
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| < t) for t = sqrt(degrees) tan(angle)."""
    cosine_sq, odd = math.cos(angle) ** 2, degrees % 2
    # The first term of the series, and then each from the one before.
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine_sq * (power - 1) / power
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def sign_flip_p(differences: Sequence[float], *, num_samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of a mean, by flipping the signs of the differences (Fisher's randomisation).

    Args:
        differences: one a pair. Where the pair's two are exchangeable, each sign is a coin's.
        num_samples: sign patterns drawn where 2^n are too many (n above 12).
        seed: of these draws.

    Returns:
        The share of sign patterns whose mean is at least as far from 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    observed = abs(values.sum())
    # Sums of the same numbers in another order differ in the last bits; a tie is a tie.
    bar = observed - 1e-12 * np.abs(values).sum()
    if count <= _EXACT_SIGNS:
        bits = np.arange(2**count)[:, None] >> np.arange(count)[None, :] & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ values) >= bar))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(num_samples, count))
    return float((1 + np.count_nonzero(np.abs(signs @ values) >= bar)) / (1 + num_samples))


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    result: Floats = (last - (counts - 1) / 2)[place]
    return result


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation; nan where one of the two does not vary."""
    return float(_rank_correlations(np.stack([np.asarray(a), np.asarray(b)]))[0, 1])


def _rank_correlations(rows: NDArray[Any]) -> Floats:
    ranked = np.stack([ranks(row) for row in rows])
    centred = ranked - ranked.mean(axis=1, keepdims=True)
    sizes = np.sqrt((centred**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = centred @ centred.T / np.outer(sizes, sizes)
    return result


@dataclass(frozen=True, kw_only=True)
class GroupSeparation:
    """Whether profiles of a group are more alike than profiles of different groups.

    Attributes:
        within: mean rank correlation over pairs of one group.
        between: the same over pairs of different groups.
        p: one-sided p of `within - between`, by permuting the labels.
    """

    within: float
    between: float
    p: float

    @property
    def statistic(self) -> float:
        """Within minus between."""
        return self.within - self.between


def permutation_p_between_groups(
    profiles: ArrayLike, labels: Sequence[str], *, num_permutations: int = 9999, seed: int = 0
) -> GroupSeparation:
    """Test whether groups of profiles differ, by their rank correlations.

    Args:
        profiles: [number of profiles, layers].
        labels: the group of each profile.
        num_permutations: of the labels.
        seed: of the permutations.

    Returns:
        The mean correlations and p: (1 + permutations that separate the groups at least as well)
        / (1 + permutations).

    Raises:
        ValueError: the lengths differ, there is one group only, or none has two profiles.
    """
    rows = np.asarray(profiles, dtype=np.float64)
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    counts = np.bincount(codes)
    if len(rows) != len(codes) or len(counts) < 2 or counts.max() < 2:
        raise ValueError(
            f"{len(rows)} profiles with labels={sorted(set(labels))}: give a label a profile, "
            "at least two groups, and two profiles in at least one"
        )
    first, second = np.triu_indices(len(rows), 1)
    correlations = _rank_correlations(rows)[first, second]

    def separation(codes: NDArray[Any]) -> tuple[float, float]:
        same = codes[first] == codes[second]
        return float(correlations[same].mean()), float(correlations[~same].mean())

    within, between = separation(codes)
    draw = np.random.default_rng(seed)
    as_far = 0
    for _ in range(num_permutations):
        one, other = separation(draw.permutation(codes))
        as_far += one - other >= within - between - 1e-12
    return GroupSeparation(within=within, between=between, p=(1 + as_far) / (1 + num_permutations))


def bootstrap_ci(
    values: ArrayLike,
    statistic: Callable[[Floats], Any] = lambda sample: sample.mean(axis=0),
    *,
    confidence: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Percentile interval of a statistic over resamples of the first axis.

    Args:
        values: [number of observations, ...].
        statistic: of a sample of the same shape; by default the mean over the first axis.
        confidence: of the interval, between 0 and 1.
        num_samples: resamples.
        seed: of the draws.

    Returns:
        Lower and upper end, each shaped like the statistic.
    """
    observations = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(seed)
    count = len(observations)
    found = np.stack(
        [
            np.asarray(statistic(observations[draw.integers(0, count, count)]))
            for _ in range(num_samples)
        ]
    )
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
