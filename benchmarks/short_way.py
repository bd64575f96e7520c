"""What the short way of small classifications brings: /classify with it / by way of ASGI, the bundled model.

    python benchmarks/short_way.py [--seconds 4] [--rounds 9]

Two servers, one of which is idle while wrk loads the other, in turns; ratios are medians over the rounds. Once as they
are, and once with an engine that answers at once: HTTP, decoding, batching and answers are left.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from measure import in_turns, write_results
from peers.load import Saturation, saturate
from server import Server, igd_server

from models import BUNDLED, sample_files

CONNECTIONS = (1, 8, 32, 128)
BY_ASGI = "from service import connection; connection.may_be_direct = lambda scope: False"
NO_ENGINE = """import numpy as np
from service.predictor import Predictor
rows = np.full((1024, 5, 10), 0.1, np.float32)
Predictor.both_passes = lambda self, defense, inputs: rows[: inputs.count].copy()"""
ENGINES = {"as it is": "", "answers at once": NO_ENGINE}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="of each run")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = [row for name in ENGINES for row in _measure(name, arguments.seconds, arguments.rounds)]
    write_results("short_way", rows)


def _measure(engine: str, seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    with _served(ENGINES[engine]) as short, _served(f"{ENGINES[engine]}\n{BY_ASGI}") as long:
        for connections in CONNECTIONS:
            sides = (partial(_run, server, connections, seconds) for server in (short, long))
            yield _row(engine, connections, in_turns(*sides, rounds))


@contextmanager
def _served(before: str) -> Iterator[Server]:
    with igd_server(BUNDLED, before=before) as server:
        _run(server, 32, 2)
        yield server


def _run(server: Server, connections: int, seconds: float) -> tuple[Saturation, float]:
    """What wrk saw, and the event loop's processor time for a request in microseconds."""
    before_s = _loop_cpu_s(server)
    found = saturate(server.url, connections, seconds, bodies=sample_files(BUNDLED))
    return found, 1e6 * (_loop_cpu_s(server) - before_s) / (found.requests_per_s * seconds)


def _loop_cpu_s(server: Server) -> float:
    nanoseconds = Path(f"/proc/{server.pid}/task/{server.pid}/schedstat").read_text().split()[0]
    return int(nanoseconds) / 1e9


def _row(engine: str, connections: int, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    def ratio(of: Any) -> float:
        return statistics.median(of(short) / of(long) for short, long in pairs)

    def median(of: Any) -> float:
        return statistics.median(of(short) for short, _ in pairs)

    row = {
        "engine": engine,
        "connections": connections,
        "requests/s": median(lambda run: run[0].requests_per_s),
        "requests/s, ratio": ratio(lambda run: run[0].requests_per_s),
        "p99 ms": median(lambda run: run[0].p99_ms),
        "p99, ratio": ratio(lambda run: run[0].p99_ms),
        "loop us/request": median(lambda run: run[1]),
        "loop us, ratio": ratio(lambda run: run[1]),
        "errors": sum(run.errors for pair in pairs for run, _ in pair),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
