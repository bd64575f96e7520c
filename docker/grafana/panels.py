"""What panels are made of: a title, a unit, and pairs of PromQL and legend."""

from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
COLUMNS, HEIGHT, STAT_HEIGHT = 24, 8, 4
HERE = 'job="ig-defense",instance=~"$instance"'
PER_S = f"{{{HERE}}}[$__rate_interval]"
IMAGES_PER_S = "suffix: img/s"
LOG_SCALE = {"scaleDistribution": {"type": "log", "log": 10}}  # where a queue would hide all other stages

Json = dict[str, Any]
Rows = list[tuple[str, list[Json]]]

OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"values": False, "calcs": ["lastNotNull"], "fields": ""},
        "textMode": "auto",
        "colorMode": "none",
        "graphMode": "none",
    },
    "bargauge": {
        "reduceOptions": {"values": False, "calcs": ["lastNotNull"], "fields": ""},
        "orientation": "horizontal",
        "displayMode": "basic",
    },
}


def panel(
    title: str, unit: str, *queries: tuple[str, str], kind: str = "timeseries", width: int = 12, **field: Any
) -> Json:
    """A panel; ``queries`` are pairs of PromQL and legend, ``field`` goes to Grafana's field configuration."""
    instant = kind != "timeseries"
    targets = [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "instant": instant, "range": not instant}
        for i, (expr, legend) in enumerate(queries)
    ]
    # A logarithmic scale has no zero.
    defaults = {"unit": unit} | ({} if "custom" in field else {"min": 0}) | field
    return {
        "type": kind,
        "title": title,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": STAT_HEIGHT if kind == "stat" else HEIGHT, "x": 0, "y": 0},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": OPTIONS[kind],
        "targets": targets,
    }


def stat(
    title: str, unit: str, expr: str, legend: str = "", *, width: int = 4, text: bool = False, **field: Any
) -> Json:
    """A single figure, or, with ``text``, the legend in its place."""
    made = panel(title, unit, (expr, legend), kind="stat", width=width, **field)
    made["options"] = made["options"] | ({"textMode": "name"} if text else {})
    return made


def if_nan(text: str) -> list[Json]:
    """What to show in place of NaN, which says that there is nothing to measure."""
    return [{"type": "special", "options": {"match": "nan", "result": {"text": text, "index": 0}}}]


def quantiles(metric: str, by: str = "") -> list[tuple[str, str]]:
    """p50, p95 and p99 of a histogram; ``by`` is a label to keep."""
    labels, legend = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", "")
    return [
        (f"histogram_quantile({q}, sum by ({labels}) (rate({metric}[$__rate_interval])))", f"{legend}p{q * 100:g}")
        for q in (0.5, 0.95, 0.99)
    ]
