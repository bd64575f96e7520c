"""How much of the engine's throughput is left behind HTTP: saturated /classify / a bare loop over the same engine (c).

    python benchmarks/http_throughput.py [--seconds 6] [--rounds 3]

wrk (on the same processors) posts one PNG a request over 1 to 256 connections, for the given time, or as long as 25
batches take: what is under way when it stops does not count. The bare loop predicts batches of 64 in this process while
the server is idle, before and after each of these runs; where connections are fewer, batches of as many images, too:
what small batches lose is not lost to HTTP. A ratio is against the mean of before and after, and of the rounds' ratios,
as of all figures, the median counts.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from measure import plot_lines, write_results
from peers.load import BATCH, long_enough, saturate
from server import Server, igd_server

from models import models, pixels_of, predictor_of, sample_files, settings_of

CONNECTIONS = (1, 8, 32, 64, 128, 256)
RATIO, RATIO_OF_AS_MANY = "/classify / bare loop", "/classify / bare loop of as many images"


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="of each run, at least")
    parser.add_argument("--rounds", type=int, default=3, help="of runs with as many connections")
    parser.add_argument("--compile", help="in place of the engine that is served; has results of its own")
    arguments = parser.parse_args()
    engine = {"compile": arguments.compile} if arguments.compile else {}
    rows = [
        row
        for name, model in models().items()
        for row in _measure(name, model, arguments.seconds, arguments.rounds, engine)
    ]
    results = "http_throughput" + (f"_{arguments.compile}" if arguments.compile else "")
    write_results(results, rows)
    plot_lines(
        results, {name: _series(rows, name) for name in models()}, xlabel="connections", ylabel=RATIO, log_x=True
    )


def _series(rows: list[dict[str, Any]], model: str) -> list[tuple[float, float]]:
    return [(row["connections"], row[RATIO]) for row in rows if row["model"] == model]


def _measure(name: str, model: Path, seconds: float, rounds: int, engine: dict[str, str]) -> list[dict[str, Any]]:
    settings = settings_of(model) | engine
    bare, files = BareLoop(model, settings), sample_files(model)
    with igd_server(model, **settings) as server:
        saturate(server.url, 32, seconds / 2, bodies=files)
        return [
            _median_row(name, [_run(server, bare, files, connections, seconds) for _ in range(rounds)])
            for connections in CONNECTIONS
        ]


def _median_row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row = {"model": name} | {column: median(run[column] for run in runs) for column in runs[0]}
    row |= {"smallest": min(run[RATIO] for run in runs), "largest": max(run[RATIO] for run in runs)}
    return row | {"errors": sum(run["errors"] for run in runs)}


def _run(server: Server, bare: "BareLoop", files: Path, connections: int, seconds: float) -> dict[str, Any]:
    sizes = sorted({min(connections, BATCH), BATCH})
    before = {size: bare.images_per_s(seconds / 3, size) for size in sizes}
    counted, cpu_s = server.metrics(), server.cpu_s()
    found = saturate(server.url, connections, long_enough(seconds, before[sizes[0]], sizes[0]), bodies=files)
    cpu_s = server.cpu_s() - cpu_s + found.client_cpu_s
    mean_batch = server.mean_batch_since(counted)
    rates = [(before[size] + bare.images_per_s(seconds / 3, size)) / 2 for size in sizes]
    run = {
        "connections": connections,
        "requests/s": found.requests_per_s,
        "bare loop images/s": rates[-1],
        RATIO: found.requests_per_s / rates[-1],
        RATIO_OF_AS_MANY: found.requests_per_s / rates[0],
        "p50 ms": found.p50_ms,
        "p99 ms": found.p99_ms,
        "mean batch": mean_batch,
        "errors": found.errors,
        "client CPU us/request": 1e6 * found.client_cpu_s / (found.requests_per_s * found.seconds),
        "cores busy": cpu_s / (found.seconds * len(os.sched_getaffinity(0))),
    }
    print(run, flush=True)
    return run


class BareLoop:
    """The same engine with nothing around it: pixels in, probabilities out, one batch after the other."""

    def __init__(self, model: Path, settings: dict[str, str]) -> None:
        precision, compiler = settings.get("dtype", "auto"), settings.get("compile", "auto")
        self._predictor, self._defense = predictor_of(model, precision, compiler)

    def images_per_s(self, seconds: float, batch: int) -> float:
        """Measured for about that long."""
        pixels = pixels_of(self._predictor, batch)
        started, images = time.perf_counter(), 0
        while (took_s := time.perf_counter() - started) < seconds:
            self._predictor.predict(self._defense, pixels)
            images += batch
        return images / took_s


if __name__ == "__main__":
    main()
