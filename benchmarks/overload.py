"""What happens as load grows: latency and goodput from a quarter of saturation to three times it (e).

    python benchmarks/overload.py [--seconds 8] [--rounds 3]

Saturation is what wrk gets over 128 connections, measured anew in each round, in which then requests come at Poisson
times, answered or not; latency counts from when a request was due. The queue holds what a second answers (128 images at
least, 1,024 at most); beyond saturation as many requests are due at the start, so that it is full, and requests are
refused, from then on. Goodput counts predictions that came while the load lasted; the rest was refused with 429, came
after it, or is an error. Of each figure the median over rounds counts, of errors the sum; goodput is compared with its
round's peak. A load lasts for the given time, or as long as 25 batches take.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from measure import plot_lines, write_results
from peers.load import BATCH, Offered, long_enough, offered, saturate
from server import igd_server

from models import models, sample_files, settings_of

LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 3.0)
QUEUE_S, QUEUE_SIZES = 1.0, (2 * BATCH, 1024)
CONNECTIONS, MOST_CONNECTIONS = 128, 2048


@dataclass(frozen=True)
class Round:
    """Of all loads: saturation, seconds of each load, and what was found there."""

    capacity: float
    seconds: float
    runs: dict[float, Offered]

    @property
    def peak(self) -> float:
        """The most answers in time of all its loads."""
        return max(run.ok_in_time for run in self.runs.values())


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each load, at least")
    parser.add_argument("--rounds", type=int, default=3, help="of all loads")
    arguments = parser.parse_args()
    measured = [_measure(name, model, arguments.seconds, arguments.rounds) for name, model in models().items()]
    rows = [row for of_model in measured for row in of_model]
    write_results("overload", rows)
    latencies = {f"{name}, {p}": _series(rows, name, f"{p} ms") for name in models() for p in ("p50", "p99")}
    plot_lines("overload_latency", latencies, xlabel="offered load / saturation", ylabel="ms", log_y=True)
    goodput = {name: _series(rows, name, "goodput / peak") for name in models()}
    plot_lines("overload_goodput", goodput, xlabel="offered load / saturation", ylabel="goodput / its peak")


def _series(rows: list[dict[str, Any]], model: str, column: str) -> list[tuple[float, float]]:
    return [(row["load"], row[column]) for row in rows if row["model"] == model]


def _measure(name: str, model: Path, seconds: float, rounds: int) -> list[dict[str, Any]]:
    files, settings = sample_files(model), settings_of(model)
    with igd_server(model, **settings) as server:
        answered = round(QUEUE_S * _saturation(server.url, files, seconds))
    queue = sorted([answered, *QUEUE_SIZES])[1]
    with igd_server(model, **settings, max_queue=queue) as server:
        found = [_round(name, server.url, files, seconds, queue, seed) for seed in range(rounds)]
    return [_row(name, load, found) for load in LOADS]


def _saturation(url: str, files: Path, seconds: float) -> float:
    rate = saturate(url, CONNECTIONS, seconds / 4, bodies=files).requests_per_s
    return saturate(url, CONNECTIONS, long_enough(seconds / 2, rate), bodies=files).requests_per_s


def _round(name: str, url: str, files: Path, seconds: float, queue: int, seed: int) -> Round:
    capacity, runs = _saturation(url, files, seconds), dict[float, Offered]()
    run_s = long_enough(seconds, capacity)
    for load in LOADS:
        of_load = {"seed": seed, "connections": MOST_CONNECTIONS, "ahead": queue if load > 1 else 0}
        runs[load] = offered(url, load * capacity, run_s, bodies=files, **of_load)
        print(name, load, runs[load], flush=True)
    return Round(capacity, run_s, runs)


def _row(name: str, load: float, rounds: list[Round]) -> dict[str, Any]:
    runs = [found.runs[load] for found in rounds]
    shares = [found.runs[load].ok_in_time / found.peak for found in rounds]
    return {
        "model": name,
        "load": load,
        "offered /s": load * median(found.capacity for found in rounds),
        "goodput /s": median(found.runs[load].ok_in_time / found.seconds for found in rounds),
        "goodput / peak": median(shares),
        "smallest": min(shares),
        "largest": max(shares),
        "refused (429)": median(run.rejected for run in runs),
        "errors": sum(run.errors for run in runs),
        "p50 ms": median(run.p50_ms for run in runs),
        "p99 ms": median(run.p99_ms for run in runs),
        "client late p99 ms": median(run.late_p99_ms for run in runs),
    }


if __name__ == "__main__":
    main()
