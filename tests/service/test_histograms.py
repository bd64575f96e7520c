"""The histogram of the hot paths, against prometheus-client's own."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from service.histograms import HotHistogram

BUCKETS = (0.1, 0.5, 1, 2)
VALUES = np.array([0.0, 0.1, 0.3, 0.5, 0.75, 1.0, 3.0])


@pytest.fixture
def reference():
    """What prometheus-client prints for the values."""
    disable_created_metrics()
    registry = CollectorRegistry()
    histogram = Histogram("h", "Some.", ["stage"], buckets=BUCKETS, registry=registry).labels("a")
    for value in VALUES:
        histogram.observe(value)
    return generate_latest(registry)


def hot():
    registry = CollectorRegistry()
    histogram = HotHistogram("h", "Some.", BUCKETS, label="stage", values=["a"], registry=registry)
    return registry, histogram.series("a")


def test_values_one_by_one_are_told_as_prometheus_client_tells_them(reference):
    registry, series = hot()
    for value in VALUES:
        series.observe(value)
    assert generate_latest(registry) == reference


def test_an_array_of_values_counts_as_much_as_each_of_them(reference):
    registry, series = hot()
    series.observe_all(VALUES[:3])
    series.observe_all(VALUES[3:])
    series.observe_all(VALUES[:0])
    assert generate_latest(registry) == reference


def test_what_is_no_number_is_left_out(reference):
    registry, series = hot()
    series.observe_all(np.array([*VALUES, np.nan, np.inf]))
    assert generate_latest(registry) == reference


def test_series_are_there_before_the_first_value():
    registry, _ = hot()
    assert b'h_count{stage="a"} 0.0' in generate_latest(registry)
