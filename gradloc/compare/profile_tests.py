"""What per-batch gradient norms show: do kinds have profiles of their own, and above whose text?

Resamples and permutes rows that are already traced (`profiles`); runs no model. The batches are
taken to be independent draws, so make them of distinct facts or entities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class KindCorrelations:
    """Rank correlations of profiles made from disjoint halves of batches.

    Args:
        kinds: names, in the order of the matrix.
        matrix: [num_kinds, num_kinds], the mean over splits of Spearman's correlation between a
            half of one kind's batches and a half of another's, and on the diagonal between the two
            halves of one kind. Both profiles are taken relative to different halves of the
            reference, so that they share no noise.
        num_batches: in each half.
    """

    kinds: tuple[str, ...]
    matrix: Floats
    num_batches: int

    @property
    def within(self) -> float:
        """Mean correlation between halves of one kind."""
        return float(np.mean(np.diag(self.matrix)))

    @property
    def between(self) -> float:
        """Mean correlation between halves of different kinds; nan for one kind."""
        others = self.matrix[~np.eye(len(self.kinds), dtype=bool)]
        return float(others.mean()) if others.size else math.nan

    @property
    def statistic(self) -> float:
        """Within minus between: 0 where the kinds have one profile."""
        return self.within - self.between

    @property
    def corrected(self) -> Floats:
        """The matrix freed of noise: each entry over the root of its two kinds' own correlations.

        Spearman's (1904) correction for attenuation: an estimate of what the correlation would be
        with endlessly many batches, 1 on the diagonal; nan where a kind does not correlate with
        itself.
        """
        own = np.diag(self.matrix)
        with np.errstate(invalid="ignore"):
            scale = np.sqrt(np.outer(own, own))
        return np.where((own[:, None] > 0) & (own[None, :] > 0), self.matrix / scale, math.nan)


@dataclass(frozen=True, kw_only=True)
class KindTest:
    """Whether kinds of probes have different layer profiles.

    Args:
        observed: the correlations as measured.
        p: one-sided p of `observed.statistic`: the share of permutations of the batches' kinds that
            separate the kinds at least as well.
    """

    observed: KindCorrelations
    p: float


@dataclass(frozen=True, kw_only=True)
class LayerRatios:
    """Relative gradient norms with what is known of their error, each [num_layers].

    Args:
        ratio: mean probe norm / mean reference norm.
        geometric: the same of geometric means, which single batches with huge norms sway less.
        low: lower end of its 95 % bootstrap interval.
        high: upper end.
        p_above: one-sided p of the probes' mean norm being the larger one.
        p_below: of its being the smaller one.
    """

    ratio: Floats
    geometric: Floats
    low: Floats
    high: Floats
    p_above: Floats
    p_below: Floats

    @property
    def num_above(self) -> int:
        """Layers whose interval lies above 1; some do by chance, see `num_above_corrected`."""
        return int((self.low > 1).sum())

    @property
    def num_below(self) -> int:
        """Layers whose interval lies below 1."""
        return int((self.high < 1).sum())

    @property
    def num_above_corrected(self) -> int:
        """Layers above 1 at 5 % over all layers and both directions (Holm)."""
        return int((holm(np.concatenate([self.p_above, self.p_below])) < 0.05)[: len(self)].sum())

    @property
    def num_below_corrected(self) -> int:
        """Layers below 1 at 5 % over all layers and both directions (Holm)."""
        return int((holm(np.concatenate([self.p_above, self.p_below])) < 0.05)[len(self) :].sum())

    def __len__(self) -> int:
        return len(self.ratio)


def kind_correlations(
    kinds: Mapping[str, Floats],
    references: Mapping[str, Floats],
    *,
    num_splits: int = 100,
    seed: int = 0,
) -> KindCorrelations:
    """Correlate relative profiles within and between kinds, over random splits into halves.

    Args:
        kinds: kind -> [num_batches, num_layers] norms. All halves hold as many batches as half of
            the smallest kind: more batches give less noise, and so a higher correlation.
        references: kind -> [num_batches, num_layers] norms of the text that it is relative to.
        num_splits: how often both are split.
        seed: of the splits.

    Raises:
        ValueError: no kinds, a kind or reference of fewer than two batches, or layers that differ.
    """
    splits = _Splits(kinds, references, num_splits, seed)
    return splits.correlations(splits.pooled)


def compare_kinds(
    kinds: Mapping[str, Floats],
    reference: Floats,
    *,
    num_splits: int = 20,
    num_permutations: int = 1999,
    seed: int = 0,
) -> KindTest:
    """Test whether kinds have different relative profiles.

    The statistic is the mean correlation within kinds minus that between kinds; the null
    distribution comes from dealing the batches out to the kinds at random. All kinds are relative
    to one reference: with one for each, its noise would be shared within kinds and not between.

    Args:
        kinds: kind -> [num_batches, num_layers] norms, at least two kinds.
        reference: [num_batches, num_layers] norms.
        num_splits: into halves, for every evaluation of the statistic.
        num_permutations: of the kinds' names over all batches.
        seed: of splits and permutations.

    Raises:
        ValueError: fewer than two kinds, or what `kind_correlations` raises.
    """
    if len(kinds) < 2:
        raise ValueError(f"kinds={list(kinds)}: at least two, to compare them")
    splits = _Splits(kinds, dict.fromkeys(kinds, reference), num_splits, seed)
    observed = splits.correlations(splits.pooled)
    draw = np.random.default_rng((seed, 1))
    as_far = sum(
        splits.correlations(draw.permutation(splits.pooled)).statistic >= observed.statistic - 1e-12
        for _ in range(num_permutations)
    )
    return KindTest(observed=observed, p=(1 + as_far) / (1 + num_permutations))


def layer_ratios(
    probes: Floats,
    reference: Floats,
    *,
    num_resamples: int = 4000,
    num_permutations: int = 9999,
    seed: int = 0,
) -> LayerRatios:
    """Relative gradient norms a layer, with intervals and tests.

    Intervals are percentiles over resamples of both the probes' and the reference's batches. The
    tests permute which batch is a probe's, with Welch's t as the statistic, which keeps them honest
    where the two spread differently (Janssen 1997).

    Args:
        probes: [num_batches, num_layers] norms, at least two batches.
        reference: the same of ordinary text.
        num_resamples: for the intervals.
        num_permutations: for the tests; p is at least 1 / (1 + num_permutations).
        seed: of both.

    Raises:
        ValueError: fewer than two batches of either, layers that differ, or a layer without
            gradient in the reference.
    """
    probes, reference = _checked({"probes": probes, "reference": reference})
    if not (reference > 0).any(axis=0).all():
        raise ValueError(
            "a layer has no gradient in any batch of the reference, so its ratio is not defined: "
            "leave it out"
        )
    draw = np.random.default_rng(seed)
    resampled = _resampled_means(probes, num_resamples, draw) / _resampled_means(
        reference, num_resamples, draw
    )
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    pooled = np.concatenate([probes, reference])
    observed = _welch(pooled, np.arange(len(probes))[None, :])[0]
    chosen = np.argsort(draw.random((num_permutations, len(pooled))), axis=1)[:, : len(probes)]
    permuted = _welch(pooled, chosen)
    slack = 1e-9 * (1 + np.abs(observed))
    return LayerRatios(
        ratio=probes.mean(axis=0) / reference.mean(axis=0),
        geometric=_geometric_means(probes) / _geometric_means(reference),
        low=low,
        high=high,
        p_above=(1 + (permuted >= observed - slack).sum(axis=0)) / (1 + num_permutations),
        p_below=(1 + (permuted <= observed + slack).sum(axis=0)) / (1 + num_permutations),
    )


def holm(p_values: ArrayLike) -> Floats:
    """Holm's (1979) adjusted p-values: below a level, they hold it over all tests together."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    return np.minimum(adjusted, 1.0)


def benjamini_hochberg(p_values: ArrayLike) -> Floats:
    """Benjamini and Hochberg's (1995) adjusted p-values: they bound the share of false finds."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(len(p) / np.arange(len(p), 0, -1) * p[order])
    return np.minimum(adjusted, 1.0)


class _Splits:
    """Fixed random splits of every kind's batches and of the references into halves."""

    def __init__(
        self,
        kinds: Mapping[str, Floats],
        references: Mapping[str, Floats],
        num_splits: int,
        seed: int,
    ) -> None:
        self.kinds = tuple(kinds)
        if not kinds or set(kinds) != set(references):
            raise ValueError(
                f"kinds={list(kinds)}, references={list(references)}: give each kind a reference"
            )
        rows = _checked(kinds)
        texts = _checked({f"the reference of {kind}": references[kind] for kind in kinds})
        if rows[0].shape[1] != texts[0].shape[1]:
            raise ValueError(
                f"norms of {rows[0].shape[1]} layers, of {texts[0].shape[1]} in the reference"
            )
        self.num_batches = min(map(len, rows)) // 2
        draw = np.random.default_rng((seed, 0))
        self.pooled = np.concatenate(rows)
        starts = np.cumsum([0, *map(len, rows)])
        # [num_splits, num_kinds, 2 halves, num_batches] positions in `pooled`.
        self._halves = np.stack(
            [
                start + _halves(len(one), self.num_batches, num_splits, draw)
                for start, one in zip(starts[:-1], rows, strict=True)
            ],
            axis=1,
        )
        # References that stand on the same text, a batch for a batch, must be halved alike: then
        # no text is in both halves.
        parts = {
            count: _halves(count, count // 2, num_splits, draw)
            for count in sorted({len(text) for text in texts})
        }
        self._references = np.stack([text[parts[len(text)]].mean(axis=2) for text in texts], axis=1)

    def correlations(self, pooled: Floats) -> KindCorrelations:
        """Of these rows, the first kind's first."""
        profiles = pooled[self._halves].mean(axis=3) / self._references
        ranked = np.argsort(np.argsort(profiles, axis=-1), axis=-1).astype(np.float64)
        # Norms of different layers do not tie, so every profile has the ranks 0 to count - 1.
        count = ranked.shape[-1]
        ranked = (ranked - (count - 1) / 2) / math.sqrt(count * (count**2 - 1) / 12)
        # First halves against second halves.
        matrix = np.einsum("skl,sjl->kj", ranked[:, :, 0], ranked[:, :, 1]) / len(ranked)
        return KindCorrelations(
            kinds=self.kinds, matrix=(matrix + matrix.T) / 2, num_batches=self.num_batches
        )


def _halves(count: int, size: int, num_splits: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Two disjoint random subsets of `size` of `count`, [num_splits, 2, size]."""
    order = np.argsort(draw.random((num_splits, count)), axis=1)[:, : 2 * size]
    return order.reshape(num_splits, 2, size)


def _checked(named: Mapping[str, Floats]) -> list[Floats]:
    rows = [np.asarray(one, dtype=np.float64) for one in named.values()]
    for name, one in zip(named, rows, strict=True):
        if one.ndim != 2 or len(one) < 2 or one.shape[1] != rows[0].shape[-1]:
            raise ValueError(
                f"{name} has shape {one.shape}: expected norms [num_batches >= 2, "
                f"{rows[0].shape[-1]} layers]"
            )
    return rows


def _geometric_means(rows: Floats) -> Floats:
    # A layer that takes no part in a batch has norm 0 there.
    means: Floats = np.exp(np.log(np.maximum(rows, 1e-30)).mean(axis=0))
    return means


def _resampled_means(rows: Floats, num_resamples: int, draw: np.random.Generator) -> Floats:
    weights = draw.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=num_resamples)
    means: Floats = weights @ rows / len(rows)
    return means


def _welch(pooled: Floats, chosen: NDArray[np.int64]) -> Floats:
    """Welch's t of the chosen rows against the others, [len(chosen), num_layers]."""
    count, size = len(pooled), chosen.shape[1]
    mask = np.zeros((len(chosen), count))
    np.put_along_axis(mask, chosen, 1.0, axis=1)
    # Centred first, so that squares lose no digits.
    rows = pooled - pooled.mean(axis=0)
    sums, squares = mask @ rows, mask @ rows**2
    parts = []
    for number, total, square in (
        (size, sums, squares),
        (count - size, rows.sum(axis=0) - sums, (rows**2).sum(axis=0) - squares),
    ):
        variance = np.maximum(square - total**2 / number, 0) / (number - 1)
        parts.append((total / number, variance / number))
    (mean, error), (other, other_error) = parts
    # Batches without any spread: a difference is then as far out as can be.
    t: Floats = (mean - other) / np.maximum(np.sqrt(error + other_error), 1e-150)
    return t
