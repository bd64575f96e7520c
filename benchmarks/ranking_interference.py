"""What a ranking in progress does to the latency of /classify, on this machine.

    python benchmarks/ranking_interference.py [--rate 20] [--seconds 10] [--rounds 3]

A real server with its worker; requests at a fixed rate (an open loop: a slow answer does not delay others), in
turns without and with a ranking under way (LO-IR at an early layer, which would take minutes and is cancelled).
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from measure import write_results
from server import Server, igd_server

from models import BUNDLED


def main() -> None:
    """Measure in turns and print p50 and p99 of both, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with igd_server(BUNDLED, worker=True) as server:
        rows = _measure(server, arguments.rate, arguments.seconds, arguments.rounds)
    write_results("ranking_interference", rows)


def _measure(server: Server, rate: float, seconds: float, rounds: int) -> list[dict[str, Any]]:
    idle: list[float] = []
    ranking: list[float] = []
    _load(server, rate, 2)
    for _ in range(rounds):
        idle += _load(server, rate, seconds)
        job = start_ranking(server)
        ranking += _load(server, rate, seconds)
        server.call(f"/rank-neurons/{job}", method="DELETE")
        time.sleep(1)
    figures = {name: _percentiles(times) for name, times in (("idle", idle), ("ranking", ranking))}
    return [
        {
            "latency": name,
            "idle ms": 1000 * figures["idle"][name],
            "with a ranking ms": 1000 * figures["ranking"][name],
            "ratio": figures["ranking"][name] / figures["idle"][name],
            "requests of each": len(idle),
            "rate /s": rate,
        }
        for name in ("p50", "p99")
    ]


def _percentiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def _load(server: Server, rate: float, seconds: float) -> list[float]:
    """Latencies in seconds, counted from when a request was due."""
    image = sorted((BUNDLED / "samples").glob("*.png"))[0].read_bytes()
    started = time.perf_counter()

    def one(number: int) -> float:
        due = started + number / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        server.call("/classify", image, {"Content-Type": "image/png"})
        return time.perf_counter() - due

    with ThreadPoolExecutor(16) as clients:
        return list(clients.map(one, range(int(rate * seconds))))


def start_ranking(server: Server) -> str:
    """Submit a long ranking and wait until it runs."""
    body = json.dumps({"layer": "layer1", "activate": False}).encode()
    job: str = server.call("/rank-neurons", body, {"Content-Type": "application/json"})["id"]
    while not server.call(f"/rank-neurons/{job}", method="GET")["progress"]["done"]:
        time.sleep(0.2)
    return job


if __name__ == "__main__":
    main()
