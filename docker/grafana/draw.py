"""Draw the dashboards without Grafana: each panel's queries, asked of a Prometheus, at the panel's place.

    python docker/grafana/draw.py http://127.0.0.1:9090 --from 1764025200 --to 1764025800 --output docs

For pictures of what the dashboards show where no Grafana runs: titles, units, legends and places are the JSON's, looks
are not Grafana's. The replica variable is "All".
"""

import argparse
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

matplotlib.use("Agg")

DIRECTORY = Path(__file__).parent / "dashboards"
COLUMNS, WIDTH_IN, UNIT_IN = 24, 16.0, 0.36
SCRAPE_S, POINTS = 5, 240  # the first is of the provisioned data source
INK, GRAY = "#24292e", "#8a8f98"

Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A Prometheus and the time to show, Unix times."""

    url: str
    start: float
    end: float

    @property
    def step(self) -> float:
        return max(1.0, (self.end - self.start) / POINTS)

    def series(self, target: Json) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Legend, times and values of each series of a panel's query; an instant one has a single time."""
        if target["instant"]:
            found = self._ask("query", time=self.end, query=self._filled_in(target["expr"]))
        else:
            times = {"start": self.start, "end": self.end, "step": self.step}
            found = self._ask("query_range", query=self._filled_in(target["expr"]), **times)
        for each in found:
            values = np.array(each.get("values") or [each["value"]], float)
            yield legend_of(target["legendFormat"], each["metric"]), values[:, 0], values[:, 1]

    def _filled_in(self, query: str) -> str:
        """With what Grafana would put in place of its variables."""
        rate_interval = max(4 * SCRAPE_S, self.step + SCRAPE_S)
        query = query.replace("$__rate_interval", f"{rate_interval:.0f}s").replace("$instance", ".*")
        return query.replace("$__range", f"{self.end - self.start:.0f}s")

    def _ask(self, path: str, **parameters: object) -> list[Json]:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - the caller's own address
            result: list[Json] = json.load(answer)["data"]["result"]
            return result


def legend_of(pattern: str, labels: dict[str, str]) -> str:
    """``{{label}}`` replaced by its value."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda name: labels.get(name[1], ""), pattern)


def text_of(value: float, unit: str, decimals: int | None = None) -> str:
    """A value with its unit, as a person reads it."""
    if np.isnan(value):
        return "NaN"
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        return _scaled(value, ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")))
    if unit == "bytes":
        return _scaled(value, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")))
    plain = f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return plain + {"reqps": " req/s", "ops": " ops/s", "none": ""}.get(unit, unit.removeprefix("suffix:"))


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, name = next(((size, name) for size, name in units if abs(value) >= size), units[-1])
    return f"{value / size:.3g} {name}" if value else "0"


def draw(dashboard: Json, source: Source) -> Figure:
    """All panels of a dashboard."""
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) + 2
    figure = Figure(figsize=(WIDTH_IN, lines * UNIT_IN), facecolor="#f4f5f5")
    span = " to ".join(datetime.fromtimestamp(at).strftime("%H:%M:%S") for at in (source.start, source.end))
    figure.text(0.01, 1 - 1 / lines, f"{dashboard['title']}   ({span})", fontsize=15, va="center", color=INK)
    for panel in dashboard["panels"]:
        left, top = panel["gridPos"]["x"] / COLUMNS, 1 - (panel["gridPos"]["y"] + 2) / lines
        width, height = panel["gridPos"]["w"] / COLUMNS, panel["gridPos"]["h"] / lines
        if panel["type"] == "row":
            figure.text(0.01, top - height / 2, panel["title"], fontsize=11, va="center", weight="bold", color=INK)
        else:
            box = figure.add_axes((left + 0.003, top - height + 0.15 / lines, width - 0.006, height - 0.3 / lines))
            box.set(xticks=[], yticks=[], facecolor="white")
            box.spines[:].set_color("#d8dadd")
            _draw_panel(figure, box, panel, source)
    return figure


def _draw_panel(figure: Figure, box: Axes, panel: Json, source: Source) -> None:
    box.annotate(panel["title"], (0, 1), (7, -6), "axes fraction", "offset points", va="top", fontsize=10, color=INK)
    series = [each for target in panel["targets"] for each in source.series(target)]
    if not series:
        box.text(0.5, 0.45, "No data", transform=box.transAxes, ha="center", color=GRAY, fontsize=13)
    elif panel["type"] == "stat":
        _draw_stat(box, panel, series)
    else:
        _draw_chart(figure, box, panel, source, series)


def _draw_stat(box: Axes, panel: Json, series: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    field, (legend, _, values) = panel["fieldConfig"]["defaults"], series[0]
    if panel["options"]["textMode"] == "name":
        text = legend
    else:
        text = text_of(values[-1], field["unit"], field.get("decimals"))
        text = _words(field).get(text, text)
    box.text(0.5, 0.38, text, transform=box.transAxes, ha="center", va="center", color=INK, fontsize=_size(text))


def _words(field: Json) -> dict[str, str]:
    """What a value mapping says in place of a value."""
    words = {}
    for mapping in field.get("mappings", []):
        options = mapping["options"]
        values = {"NaN": options["result"]} if mapping["type"] == "special" else options
        words |= {value: word["text"] for value, word in values.items()}
    return words


def _size(text: str) -> float:
    return float(min(26, 260 / max(10, len(text))))


def _draw_chart(
    figure: Figure, box: Axes, panel: Json, source: Source, series: list[tuple[str, np.ndarray, np.ndarray]]
) -> None:
    place, field = box.get_position(), panel["fieldConfig"]["defaults"]
    bars = panel["type"] == "bargauge"
    side, below = (0.075, 0.1) if bars else (0.046, 0.3)
    axes = figure.add_axes(
        (place.x0 + side, place.y0 + below * place.height, place.width - side - 0.012, (0.83 - below) * place.height)
    )
    if bars:
        _draw_bars(axes, field, series)
    else:
        _draw_lines(axes, field, source, series)
        longest = max(len(legend) for legend, _, _ in series)
        columns = max(1, int(8.5 * panel["gridPos"]["w"] / (longest + 4)))
        axes.legend(loc="upper left", bbox_to_anchor=(-0.06, -0.17), ncols=columns, fontsize=8, frameon=False)
    axes.tick_params(labelsize=8, colors=INK, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _draw_bars(axes: Axes, field: Json, series: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    names, sizes = [legend for legend, _, _ in series][::-1], [values[-1] for *_, values in series][::-1]
    texts = [text_of(size, field["unit"], field.get("decimals")) for size in sizes]
    axes.bar_label(axes.barh(names, sizes), texts, fontsize=8, padding=3)
    axes.margins(x=0.12)


def _draw_lines(axes: Axes, field: Json, source: Source, series: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    for legend, times, values in series:
        axes.plot([datetime.fromtimestamp(at) for at in times], values, label=legend, linewidth=1.3)
    locator = AutoDateLocator(maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    axes.set_xlim(*(datetime.fromtimestamp(at) for at in (source.start, source.end)))
    if "custom" in field:
        axes.set_yscale("log", base=field["custom"]["scaleDistribution"]["log"])
    else:
        highest = max((np.nanmax(values) for *_, values in series if not np.isnan(values).all()), default=0.0)
        axes.set_ylim(field["min"], field.get("max", 1.08 * highest or 1.0))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=_all_whole(series)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text_of(value, field["unit"])))


def _all_whole(series: list[tuple[str, np.ndarray, np.ndarray]]) -> bool:
    return all(np.all(np.isnan(values) | (values == np.round(values))) for *_, values in series)


def main() -> None:
    """Write a PNG for each dashboard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("--from", dest="start", type=float, required=True, help="Unix time")
    parser.add_argument("--to", dest="end", type=float, required=True, help="Unix time")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="directory of the PNG files")
    arguments = parser.parse_args()
    source = Source(arguments.prometheus.rstrip("/"), arguments.start, arguments.end)
    for path in sorted(DIRECTORY.glob("*.json")):
        figure = draw(json.loads(path.read_text()), source)
        figure.savefig(arguments.output / f"dashboard-{path.stem}.png", dpi=80)


if __name__ == "__main__":
    main()
