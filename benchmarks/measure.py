"""Ratios that survive a noisy machine: the two sides take turns, and the median of the pairwise ratios counts."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


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


def paired_ratio(a: Callable[[], object], b: Callable[[], object], *, pairs: int = 15, warm_up: int = 2) -> Ratio:
    """Time ``a`` and ``b`` in turn; which of them goes first alternates."""
    for _ in range(warm_up):
        a(), b()
    times = []
    for i in range(pairs):
        if i % 2:
            b_s, a_s = seconds(b), seconds(a)
        else:
            a_s, b_s = seconds(a), seconds(b)
        times.append((a_s, b_s))
    ratios = [a_s / b_s for a_s, b_s in times]
    medians = (statistics.median(side) for side in zip(*times, strict=True))
    return Ratio(*medians, statistics.median(ratios), min(ratios), max(ratios), pairs)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


def write_results(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table and write it, with the JSON, to ``benchmarks/results``."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    table = "\n".join(lines)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine(), "rows": rows}, indent=1, default=asdict) + "\n"
    )
    (RESULTS / f"{name}.md").write_text(table + "\n")


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
