"""What happens as load grows: latency and goodput from a quarter of saturation to three times it (e).

    python benchmarks/overload.py [--seconds 8] [--rounds 3]

Saturation is what wrk gets over 128 connections. Then requests come at Poisson times, answered or not; latency counts
from when a request was due. Goodput counts predictions that came while the load lasted; the rest was refused with 429,
came after it, or is an error. Every round has all loads, and of each figure the median counts, of errors the sum.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from measure import plot_lines, write_results
from peers.load import Offered, offered, saturate
from server import igd_server

from models import models, sample_files, settings_of

LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 3.0)


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
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
    files = sample_files(model)
    runs: dict[float, list[Offered]] = {load: [] for load in LOADS}
    with igd_server(model, **settings_of(model)) as server:
        saturate(server.url, 128, seconds / 2, bodies=files)
        capacity = saturate(server.url, 128, seconds, bodies=files).requests_per_s
        for i in range(rounds):
            for load in LOADS:
                run = offered(server.url, load * capacity, seconds, bodies=files, seed=i, connections=2048)
                runs[load].append(run)
                print(name, load, run, flush=True)
    rows = [_row(name, load, of_load, seconds) for load, of_load in runs.items()]
    peak = max(row["goodput /s"] for row in rows)
    return [row | {"goodput / peak": row["goodput /s"] / peak} for row in rows]


def _row(name: str, load: float, runs: list[Offered], seconds: float) -> dict[str, Any]:
    goodputs = [run.ok_in_time / seconds for run in runs]
    return {
        "model": name,
        "load": load,
        "offered /s": median(run.offered for run in runs) / seconds,
        "goodput /s": median(goodputs),
        "smallest": min(goodputs),
        "largest": max(goodputs),
        "refused (429)": median(run.rejected for run in runs),
        "errors": sum(run.errors for run in runs),
        "p50 ms": median(run.p50_ms for run in runs),
        "p99 ms": median(run.p99_ms for run in runs),
        "client late p99 ms": median(run.late_p99_ms for run in runs),
    }


if __name__ == "__main__":
    main()
