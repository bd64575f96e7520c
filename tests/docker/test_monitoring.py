"""Prometheus's rules and Grafana's dashboards, as files; tests/service/test_dashboards.py asks a real Prometheus."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.metrics import Metrics

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

REPOSITORY = Path(__file__).parents[2]
PROMETHEUS, GRAFANA = REPOSITORY / "docker/prometheus", REPOSITORY / "docker/grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


@pytest.fixture(scope="module")
def promtool(find_tool: Callable[..., str]) -> Callable[..., None]:
    program = find_tool("promtool", "install Debian's package prometheus, or Prometheus itself")

    def run(*arguments: object) -> None:
        result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    return run


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text()) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def alerts() -> set[str]:
    return {rule["alert"] for rule in rules() if "alert" in rule}


def expressions(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_promtool_accepts_the_configuration_and_the_rules_it_names(promtool: Callable[..., None]) -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", *(PROMETHEUS / "rules").glob("*.yml"))


def test_every_alert_fires_when_it_should_and_not_otherwise(promtool: Callable[..., None]) -> None:
    promtool("test", "rules", PROMETHEUS / "tests/alerts.yml")


def test_no_alert_is_left_out_of_the_tests_or_the_docs() -> None:
    cases = [
        case
        for test in yaml.safe_load((PROMETHEUS / "tests/alerts.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts()
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts()
    documented = re.findall(r"^\| `(Igd\w+)` \|", (REPOSITORY / "docs/metrics.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(alerts())


def test_rules_and_dashboards_name_metrics_that_there_are() -> None:
    known = {metric.name + "_total" * (metric.type == "counter") for metric in Metrics().registry.collect()}
    histograms = {metric.name for metric in Metrics().registry.collect() if metric.type == "histogram"}
    known |= {name + suffix for name in histograms for suffix in ("_bucket", "_sum", "_count")}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = [rule["expr"] for rule in rules()] + [expr for path in DASHBOARDS for expr in expressions(path)]
    for expr in asked:
        names = set(re.findall(r"[\w:]*\bigd_\w+(?::\w+)*|process_\w+", expr))
        assert names <= known | recorded, (names - known - recorded, expr)


def test_the_dashboards_are_what_their_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "generate.py", tmp_path], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in DASHBOARDS}


def test_panels_neither_overlap_nor_share_an_id() -> None:
    for path in DASHBOARDS:
        panels = json.loads(path.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells: list[tuple[int, int]] = []
        for place in (panel["gridPos"] for panel in panels):
            columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
            cells += [(x, y) for x in columns for y in lines]
        assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_grafana_finds_the_dashboards_and_they_find_prometheus() -> None:
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/ig-defense.yml").read_text())["providers"]
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert f"./docker/grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
    assert source["url"] == "http://prometheus:9090" and compose["prometheus"]["ports"][0].endswith(":9090")
    for path in DASHBOARDS:
        panels = [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]
        assert all(panel["datasource"]["uid"] == source["uid"] for panel in panels)
