"""What happens as load grows: latency and goodput from a quarter of saturation to three times it (e).

    python benchmarks/overload.py [--seconds 8]

Saturation is what wrk gets over 128 connections. Then requests come at Poisson times, answered or not; latency counts
from when a request was due. Goodput counts predictions that came while the load lasted; the rest was refused with 429,
came after it, or is an error.
"""

import argparse
from pathlib import Path
from typing import Any

from measure import plot_lines, write_results
from peers.load import offered, saturate
from server import igd_server

from models import models, sample_files, settings_of

LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 3.0)


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    arguments = parser.parse_args()
    rows = [row for name, model in models().items() for row in _measure(name, model, arguments.seconds)]
    write_results("overload", rows)
    latencies = {f"{name}, {p}": _series(rows, name, f"{p} ms") for name in models() for p in ("p50", "p99")}
    plot_lines("overload_latency", latencies, xlabel="offered load / saturation", ylabel="ms", log_y=True)
    goodput = {name: _series(rows, name, "goodput / peak") for name in models()}
    plot_lines("overload_goodput", goodput, xlabel="offered load / saturation", ylabel="goodput / its peak")


def _series(rows: list[dict[str, Any]], model: str, column: str) -> list[tuple[float, float]]:
    return [(row["load"], row[column]) for row in rows if row["model"] == model]


def _measure(name: str, model: Path, seconds: float) -> list[dict[str, Any]]:
    files = sample_files(model)
    with igd_server(model, **settings_of(model)) as server:
        saturate(server.url, 128, seconds / 2, bodies=files)
        capacity = saturate(server.url, 128, seconds, bodies=files).requests_per_s
        runs = []
        for load in LOADS:
            runs.append((load, offered(server.url, load * capacity, seconds, bodies=files, connections=2048)))
            print(name, load, runs[-1][1], flush=True)
    peak = max(run.ok_in_time for _, run in runs) / seconds
    return [
        {
            "model": name,
            "load": load,
            "offered /s": run.offered / seconds,
            "goodput /s": run.ok_in_time / seconds,
            "goodput / peak": run.ok_in_time / seconds / peak,
            "refused (429)": run.rejected,
            "errors": run.errors,
            "p50 ms": run.p50_ms,
            "p99 ms": run.p99_ms,
            "client late p99 ms": run.late_p99_ms,
        }
        for load, run in runs
    ]


if __name__ == "__main__":
    main()
