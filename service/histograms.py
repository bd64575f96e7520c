"""A Prometheus histogram for hot paths: an observation is a bisection and two additions, without a lock.

An array of values is observed at once.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import inf

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Series:
    """One series of a histogram; it is written by one thread at a time, and read by any.

    Args:
        bounds: upper bounds of the buckets, ascending, without infinity.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_all(self, values: NDArray[np.floating]) -> None:
        """Count an array of values, [n]; those that are no numbers are left out, a sum would never be rid of them."""
        values = values[np.isfinite(values)]
        buckets = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        for bucket, count in enumerate(buckets.tolist()):
            self._counts[bucket] += count
        self._sum += float(values.sum(dtype=np.float64))

    @property
    def cumulative(self) -> list[tuple[str, float]]:
        """Upper bound, as text, and the number of values up to it, for each bucket."""
        counts = accumulate(list(self._counts))  # a copy: what is observed meanwhile must not go down again
        return [(floatToGoString(b), float(n)) for b, n in zip([*self._bounds, inf], counts, strict=True)]

    @property
    def sum(self) -> float:
        """Of all values."""
        return self._sum


class HotHistogram(Collector):
    """A histogram with one series, or with one for each value of a label.

    Args:
        name, documentation: of the metric. buckets: their upper bounds, ascending.
        label: its name, if there is one. values: all that it takes: every series is there from the start.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        *,
        label: str | None = None,
        values: Sequence[str] = (),
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, [label] if label else []
        keys = [(value,) for value in values] if label else [()]
        self._series: dict[tuple[str, ...], Series] = {key: Series(buckets) for key in keys}
        registry.register(self)

    def series(self, *value: str) -> Series:
        """The series of a label's value, to be held on to."""
        return self._series[value]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """What prometheus-client asks for at a scrape."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for key, series in self._series.items():
            family.add_metric(list(key), buckets=series.cumulative, sum_value=series.sum)
        return [family]
