"""What a log line for every request costs: /classify with IGD_ACCESS_LOG on / off, bundled model, 32 connections.

    python benchmarks/access_log.py [--seconds 6] [--rounds 5]

Two servers, one of which is idle while wrk loads the other, in turns; ratios are medians over the rounds. The server's
processor time a request says it, too, and what the log does for a request is timed by itself.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import in_turns, write_results
from peers.load import saturate
from server import Server, igd_server

from models import BUNDLED, sample_files
from service.answers import BatchRun, Classified
from service.logs import configure_logging
from service.request_log import RequestLog

CONNECTIONS = 32


@dataclass(frozen=True)
class Run:
    """What one turn under load showed."""

    requests_per_s: float
    cpu_us: float


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with igd_server(BUNDLED, access_log=False) as without, igd_server(BUNDLED, access_log=True) as with_lines:
        for server in (without, with_lines):
            _run(server, arguments.seconds / 2)
        sides = (partial(_run, server, arguments.seconds) for server in (without, with_lines))
        off, on = zip(*in_turns(*sides, arguments.rounds), strict=True)
    rows = [_row("requests/s", "requests_per_s", off, on), _row("CPU us/request", "cpu_us", off, on)]
    alone = {"what": "the log alone, us", "without": _log_us(every=False), "with a line each": _log_us(every=True)}
    rows.append(dict.fromkeys(rows[0], "") | alone)
    write_results("access_log", rows)


def _log_us(*, every: bool, times: int = 2000, repeats: int = 10) -> float:
    """What the log does for a request, in this process; the quickest of some repeats."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        configure_logging("info", "json")
        log, took_s = RequestLog(every=every), []
        for _ in range(repeats):
            began_s = time.perf_counter()
            for _ in range(times):
                scope = _ended_request()
                log.begin(scope, {})
                log.end(scope, 200, 0.005)
            took_s.append(time.perf_counter() - began_s)
    return 1e6 * min(took_s) / times


def _ended_request() -> dict[str, Any]:
    run = BatchRun(1, 1.0, 2.0, {"trunk": 0.5, "tail": 0.5})
    state = {"request_id": "0" * 32, "arrived_at": 0.0, "classified": Classified([np.zeros((5, 10))], [run], 0.5)}
    return {"method": "POST", "path": "/classify", "raw_path": b"/classify", "state": state}


def _run(server: Server, seconds: float) -> Run:
    began_s = server.cpu_s()
    found = saturate(server.url, CONNECTIONS, seconds, bodies=sample_files(BUNDLED))
    requests = found.requests_per_s * max(1, round(seconds))
    return Run(found.requests_per_s, 1e6 * (server.cpu_s() - began_s) / requests)


def _row(name: str, attribute: str, off: Sequence[Run], on: Sequence[Run]) -> dict[str, Any]:
    ratios = [getattr(b, attribute) / getattr(a, attribute) for a, b in zip(off, on, strict=True)]
    return {
        "what": name,
        "without": statistics.median(getattr(run, attribute) for run in off),
        "with a line each": statistics.median(getattr(run, attribute) for run in on),
        "with / without": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
    }


if __name__ == "__main__":
    main()
