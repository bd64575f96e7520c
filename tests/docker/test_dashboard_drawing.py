"""docker/grafana/draw.py: how values and legends read; tests/service/test_dashboards.py draws real ones."""

import importlib.util
from math import nan
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    path = Path(__file__).parents[2] / "docker/grafana/draw.py"
    spec = importlib.util.spec_from_file_location("draw_dashboards", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0262, "percentunit", "2.62%"),
        (0.0042, "s", "4.2 ms"),
        (90, "s", "1.5 min"),
        (0, "s", "0"),
        (3 * 2**20, "bytes", "3 MiB"),
        (14.98765, "reqps", "14.99 req/s"),
        (2, "none", "2"),
        (16.5, "suffix: img/s", "16.5 img/s"),
        (nan, "s", "NaN"),
    ],
)
def test_values_read_as_a_person_would_write_them(draw: ModuleType, value: float, unit: str, text: str) -> None:
    assert draw.text_of(value, unit) == text


def test_a_legend_has_the_labels_of_its_series(draw: ModuleType) -> None:
    assert draw.legend_of("{{method}} {{ version }} {{none}}", {"method": "lo-ir", "version": "v1"}) == "lo-ir v1 "


def test_every_query_is_asked_without_grafana_s_variables(draw: ModuleType) -> None:
    query = draw.Source("", 0, 600)._filled_in('increase(m{i=~"$instance"}[$__range]) / rate(m[$__rate_interval])')
    assert query == 'increase(m{i=~".*"}[600s]) / rate(m[20s])'
