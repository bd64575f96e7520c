"""What it brings to wait for those who were just answered: /classify with that / without.

    python benchmarks/returning_clients.py [--seconds 10] [--rounds 4]

Two servers, one of which is idle while wrk loads the other, in turns; ratios are medians over the rounds. Beyond a
quarter of the largest batch (64) nobody is waited for, nor where an image takes less than 2 ms, as the bundled model's.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from measure import in_turns, write_results
from peers.load import Saturation, saturate
from server import Server, igd_server

from models import models, sample_files, settings_of

CONNECTIONS = (1, 4, 8, 16, 32)
NOBODY_IS_WAITED_FOR = "from service import returning_clients; returning_clients.LONG_ITEM_S = float('inf')"
Run = tuple[Saturation, float]  # and the mean batch


def main() -> None:
    """Measure both models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each run")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    rows = []
    for name, model in models().items():
        settings = settings_of(model)
        with (
            igd_server(model, **settings) as waiting,
            igd_server(model, before=NOBODY_IS_WAITED_FOR, **settings) as other,
        ):
            for server in (waiting, other):
                _run(server, model, 32, 2)
            for connections in CONNECTIONS:
                sides = (partial(_run, server, model, connections, arguments.seconds) for server in (waiting, other))
                rows.append({"model": name} | _row(connections, in_turns(*sides, arguments.rounds)))
                print(rows[-1], flush=True)
    write_results("returning_clients", rows)


def _run(server: Server, model: Path, connections: int, seconds: float) -> Run:
    before = server.metrics()
    found = saturate(server.url, connections, seconds, bodies=sample_files(model))
    return found, server.mean_batch_since(before)


def _row(connections: int, pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    row: dict[str, Any] = {"connections": connections}
    for column, name in (("requests/s", "requests_per_s"), ("p50 ms", "p50_ms"), ("p99 ms", "p99_ms")):
        values = [(getattr(waiting, name), getattr(other, name)) for (waiting, _), (other, _) in pairs]
        row[column] = median(waiting for waiting, _ in values)
        row[f"{column}, ratio"] = median(waiting / other for waiting, other in values)
    row |= {"batch": median(waiting[1] for waiting, _ in pairs), "without": median(other[1] for _, other in pairs)}
    return row | {"errors": sum(run.errors for pair in pairs for run, _ in pair)}


if __name__ == "__main__":
    main()
