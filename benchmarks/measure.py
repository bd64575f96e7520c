"""Ratios that survive a noisy machine: the two sides take turns, and the median of the pairwise ratios counts."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import torch
from matplotlib.figure import Figure

from service.predictor import DEFAULT_THREADS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

T = TypeVar("T")

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


@dataclass(frozen=True)
class Ratio:
    """Seconds of a and of b (medians), and the ratio a / b pair by pair."""

    a_s: float
    b_s: float
    median: float
    smallest: float
    largest: float
    pairs: int


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turns(a: Callable[[], T], b: Callable[[], T], rounds: int) -> list[tuple[T, T]]:
    """What ``a`` and ``b`` gave, round by round; which of them goes first alternates."""
    pairs = []
    for i in range(rounds):
        if i % 2:
            of_b, of_a = b(), a()
        else:
            of_a, of_b = a(), b()
        pairs.append((of_a, of_b))
    return pairs


def paired_ratio(
    a: Callable[[], object], b: Callable[[], object], *, pairs: int = 15, warm_up: int = 2, block_s: float = 0.0
) -> Ratio:
    """Time ``a`` and ``b`` in turn; which of them goes first alternates.

    Args:
        block_s: of a turn. Where calls are short, one after a call of the other side finds the caches full of that
            one's weights, which is not how either runs in service: a turn is then a call that does not count and as
            many more as fit, of which the median counts.
    """
    for _ in range(warm_up):
        a(), b()
    times = in_turns(lambda: _turn_s(a, block_s), lambda: _turn_s(b, block_s), pairs)
    ratios = [a_s / b_s for a_s, b_s in times]
    medians = (statistics.median(side) for side in zip(*times, strict=True))
    return Ratio(*medians, statistics.median(ratios), min(ratios), max(ratios), pairs)


def _turn_s(call: Callable[[], object], block_s: float) -> float:
    if not block_s:
        return seconds(call)
    call()
    began_s, times = time.perf_counter(), [seconds(call)]
    while time.perf_counter() - began_s < block_s:
        times.append(seconds(call))
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": [name for name, there in torch.cpu.get_capabilities().items() if there is True],
        "threads": DEFAULT_THREADS,
        "torch": torch.__version__,
        "openvino": _version_of("openvino"),
        "python": platform.python_version(),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


def table_of(rows: list[dict[str, Any]]) -> str:
    """Rows of equal columns as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_results(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table and write it, with the JSON, to ``benchmarks/results``, or ``$BENCHMARK_RESULTS``."""
    table = table_of(rows)
    print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine(), "rows": rows}, indent=1, default=asdict) + "\n"
    )
    (RESULTS / f"{name}.md").write_text(table + "\n")


def plot_bars(name: str, labels: Sequence[str], bars: dict[str, Sequence[float]], ylabel: str, title: str = "") -> None:
    """Grouped bars, one group a label, as ``benchmarks/results/{name}.png``."""
    figure, axes = plt.subplots(figsize=(max(6, 0.9 * len(labels)), 4.5), layout="constrained")
    width = 0.8 / len(bars)
    for i, (series, values) in enumerate(bars.items()):
        places = [group + i * width for group in range(len(labels))]
        drawn = axes.bar(places, values, width, label=series)
        axes.bar_label(drawn, fmt="%.3g", fontsize=6, rotation=90, padding=2)
    axes.set_xticks([group + 0.4 - width / 2 for group in range(len(labels))], labels, fontsize=7)
    axes.set(ylabel=ylabel, title=title)
    axes.margins(y=0.15)
    figure.legend(fontsize=8, loc="outside right upper")  # inside it would hide bars
    save_plot(name, figure)


def plot_lines(
    name: str,
    series: dict[str, list[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Points (x, y) as lines, as ``benchmarks/results/{name}.png``."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for label, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            ticks := sorted({x for points in series.values() for x, _ in points}), [f"{x:g}" for x in ticks]
        )
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.15 * max(y for points in series.values() for _, y in points))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_plot(name, figure)


def save_plot(name: str, figure: Figure) -> None:
    """As ``benchmarks/results/{name}.png``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    plt.close(figure)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
