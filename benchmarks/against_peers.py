"""The same defended function behind LitServe, BentoML, Ray Serve, MLServer, a plain FastAPI handler, and igd serve (d).

    python benchmarks/against_peers.py [--seconds 4] [--rounds 4] [--systems igd litserve ...]

Same model object, decoder, client (wrk), processors and threads; each system as its own documentation advises for
throughput (``benchmarks/peers``, which installs the newest of each from PyPI). First saturation over 1 to 128
connections, in rounds in which every system has its turn, forwards and backwards; then latency at 50% and 80% of the
best system's best, with requests at Poisson times. A run takes the given time, or as long as 25 batches take; the
median over rounds counts.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from measure import plot_bars, write_results
from peers.install import install
from peers.launch import DidNotStart, serving
from peers.load import BATCH, long_enough, offered, saturate
from peers.systems import SYSTEMS
from server import igd_server

from models import models, sample_files, settings_of

CONNECTIONS = (1, 8, 32, 128)
LOADS = (0.5, 0.8)
OURS = "igd"
PORT = 8900
Cells = dict[tuple[str, Any], dict[str, list[float]]]


def main() -> None:
    """Measure all systems on both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="of each run, at least")
    parser.add_argument("--rounds", type=int, default=4, help="an even number is fair: see _turns")
    parser.add_argument("--systems", nargs="*", default=[OURS, *SYSTEMS])
    arguments = parser.parse_args()
    systems = [system for system in arguments.systems if _installed(system)]
    rows = []
    for name, model in models().items():
        saturated = _saturation(model, systems, arguments.seconds, arguments.rounds)
        best = max(statistics.median(found["requests/s"]) for found in saturated.values())
        loaded = _latency(model, systems, arguments.seconds, arguments.rounds, best)
        rows += _rows(name, systems, saturated | loaded)
    write_results("against_peers", rows)
    write_results("against_peers_lead", _leads(rows))
    _plot(rows)


@contextmanager
def _serving(system: str, model: Path) -> Iterator[str]:
    """The URL to post to."""
    if system == OURS:
        with igd_server(model, **settings_of(model)) as server:
            yield server.url
    else:
        sample = sorted(sample_files(model).iterdir())[0]
        settings = settings_of(model)
        with serving(
            system,
            model,
            PORT,
            dtype=settings.get("dtype", "auto"),
            compiler=settings.get("compile", "auto"),
            sample=sample,
        ) as endpoint:
            yield endpoint.url


def _installed(system: str) -> bool:
    if system == OURS:
        return True
    found = install(system)
    print(f"{system}: {found.problem or found.versions}", flush=True)
    return found.problem is None


def _visit(system: str, model: Path, seconds: float, measure: Callable[[str, float], None]) -> None:
    """Serve, warm up, and call ``measure`` with the URL and the requests/s of the warm-up.

    A system that does not start is left out, and said so.
    """
    try:
        with _serving(system, model) as url:
            measure(url, saturate(url, 32, seconds / 2, bodies=sample_files(model)).requests_per_s)
    except DidNotStart as error:
        print(f"{system} is left out: {error}", flush=True)


def _turns(systems: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, system): every other round goes backwards, so that a drift of the machine's speed is the same for all."""
    for number in range(rounds):
        yield from product([number], reversed(systems) if number % 2 else systems)


def _saturation(model: Path, systems: list[str], seconds: float, rounds: int) -> Cells:
    """(system, connections) -> what each round found."""
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for _, system in _turns(systems, rounds):

        def measure(url: str, rate: float, system: str = system) -> None:
            for connections in CONNECTIONS:
                run_s = long_enough(seconds, rate, min(connections, BATCH))
                found = saturate(url, connections, run_s, bodies=sample_files(model))
                _note(cells[system, connections], found.requests_per_s, found.p50_ms, found.p99_ms, found.errors)
                print(model.name, system, connections, found, flush=True)

        _visit(system, model, seconds, measure)
    return cells


def _latency(model: Path, systems: list[str], seconds: float, rounds: int, best: float) -> Cells:
    """(system, load) -> what each round found."""
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for number, system in _turns(systems, rounds):

        def measure(url: str, rate: float, system: str = system, seed: int = number) -> None:
            run_s = long_enough(seconds, best)  # the same for all: where the load is too much, the queue grows with it
            for load in LOADS:
                found = offered(url, load * best, run_s, bodies=sample_files(model), seed=seed)
                lost = found.errors + found.rejected
                _note(cells[system, f"{load:.0%}"], found.ok_in_time / run_s, found.p50_ms, found.p99_ms, lost)
                print(model.name, system, load, found, flush=True)

        _visit(system, model, seconds, measure)
    return cells


def _note(cell: dict[str, list[float]], requests_per_s: float, p50_ms: float, p99_ms: float, errors: int) -> None:
    found = {"requests/s": requests_per_s, "p50 ms": p50_ms, "p99 ms": p99_ms, "errors": errors}
    for column, value in found.items():
        cell[column].append(value)


def _rows(name: str, systems: list[str], cells: Cells) -> list[dict[str, Any]]:
    return [
        {"model": name, "system": system, "load": load}
        | {column: statistics.median(values) for column, values in cells[system, load].items()}
        | _spread(cells[system, load])
        for load in (*CONNECTIONS, *(f"{load:.0%}" for load in LOADS))
        for system in systems
        if (system, load) in cells
    ]


def _spread(cell: dict[str, list[float]]) -> dict[str, float]:
    rates = cell["requests/s"]
    return {"errors": sum(cell["errors"]), "rounds": len(rates), "smallest": min(rates), "largest": max(rates)}


def _leads(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In each cell: the best of the others, and how we compare."""
    leads = []
    for model, load in dict.fromkeys((row["model"], row["load"]) for row in rows):
        cell = {row["system"]: row for row in rows if (row["model"], row["load"]) == (model, load)}
        ours = cell.pop(OURS)
        faster = max(cell.values(), key=lambda row: row["requests/s"])
        answering = [row for row in cell.values() if not row["errors"]]  # to lose requests is no way to be quick
        least = {p: min(answering or cell.values(), key=lambda row: row[p]) for p in ("p50 ms", "p99 ms")}
        leads.append(
            {
                "model": model,
                "load": load,
                "requests/s": ours["requests/s"],
                "best other": f"{faster['requests/s']:.4g} ({faster['system']})",
                "throughput ratio": ours["requests/s"] / faster["requests/s"],
            }
            | {column: value for p, row in least.items() for column, value in _lead_in(p, ours, row).items()}
        )
    return leads


def _lead_in(column: str, ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    name = column.split()[0]
    return {
        column: ours[column],
        f"best other {name}": f"{other[column]:.4g} ({other['system']})",
        f"{name} ratio": other[column] / ours[column],
    }


def _plot(rows: list[dict[str, Any]]) -> None:
    for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        chosen = [row for row in rows if row["model"] == model and row["load"] in CONNECTIONS]
        bars = defaultdict(list)
        for row in chosen:
            bars[row["system"]].append(row["requests/s"])
        labels = [f"{connections} connections" for connections in CONNECTIONS]
        plot_bars(f"against_peers_{i}", labels, dict(bars), "requests/s at saturation", model)


if __name__ == "__main__":
    main()
