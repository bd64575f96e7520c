"""Intervals and tests for accuracies of two classifiers on the same images."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Z_95 = 1.959964


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (JASA 22, 1927); the default z is that of 95% confidence."""
    if trials <= 0:
        raise ValueError("a proportion needs at least one trial")
    rate, spread = successes / trials, z * z / trials
    center = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_interval(values: Values, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, images drawn with replacement; of differences it is a paired bootstrap."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar_p(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """McNemar's exact two-sided p for two classifiers on the same images (Psychometrika 12, 1947).

    Only images on which they differ count: under the null hypothesis each side wins one with probability 1/2.
    """
    wins, losses = int((first & ~second).sum()), int((~first & second).sum())
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1)) / 2**total
    return float(min(1.0, 2 * tail))


@dataclass(frozen=True)
class Difference:
    """How much better the first of two classifiers is on the same images.

    Attributes:
        mean: difference of accuracies. low, high: 95%, paired bootstrap. wins, losses: images that only the first, or
            only the second gets right in every draw. p: McNemar's exact.
    """

    mean: float
    low: float
    high: float
    wins: int
    losses: int
    p: float

    @property
    def is_distinguishable_from_zero(self) -> bool:
        return self.p < 0.05 and not self.low <= 0 <= self.high


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    """Compare whether images are right, [n] bool each, in the same order."""
    if first.shape != second.shape or not len(first):
        raise ValueError(f"expected outcomes of the same images, got {first.shape} and {second.shape}")
    differences = first.astype(np.float64) - second.astype(np.float64)
    low, high = bootstrap_interval(differences)
    wins, losses = int((first & ~second).sum()), int((~first & second).sum())
    return Difference(float(differences.mean()), low, high, wins, losses, mcnemar_p(first, second))
