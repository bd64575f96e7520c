"""What a ranking in progress does to the latency of /classify, on this machine.

    python benchmarks/ranking_interference.py [--rate 20] [--seconds 10] [--rounds 3]

A real server with its worker; requests at a fixed rate (an open loop: a slow answer does not delay others), in
turns without and with a ranking under way (LO-IR at an early layer, which would take minutes and is cancelled).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import write_results

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "fashion-mnist"
KEY = "benchmark"


def main() -> None:
    """Measure in turns and print p50 and p99 of both, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        server = Server(Path(data_dir))
        try:
            rows = _measure(server, arguments.rate, arguments.seconds, arguments.rounds)
        finally:
            server.stop()
    write_results("ranking_interference", rows)


def _measure(server: "Server", rate: float, seconds: float, rounds: int) -> list[dict[str, Any]]:
    idle: list[float] = []
    ranking: list[float] = []
    _load(server, rate, 2)
    for _ in range(rounds):
        idle += _load(server, rate, seconds)
        job = server.start_ranking()
        ranking += _load(server, rate, seconds)
        server.cancel(job)
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


def _load(server: "Server", rate: float, seconds: float) -> list[float]:
    """Latencies in seconds, counted from when a request was due."""
    image = sorted((MODEL / "samples").glob("*.png"))[0].read_bytes()
    started = time.perf_counter()

    def one(number: int) -> float:
        due = started + number / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        server.call("/classify", image, {"Content-Type": "image/png"})
        return time.perf_counter() - due

    with ThreadPoolExecutor(16) as clients:
        return list(clients.map(one, range(int(rate * seconds))))


class Server:
    """``igd serve`` with its worker, on a free port."""

    def __init__(self, data_dir: Path) -> None:
        environment = os.environ | {"IGD_ADMIN_KEY": KEY, "IGD_DATA_DIR": str(data_dir), "IGD_MODEL": str(MODEL)}
        command = [sys.executable, "-m", "igd", "serve", "--port", "0"]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        line = next(line for line in self._process.stdout if "listens on" in line)
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        self._address = line.split("listens on ")[1].split(",")[0]

    def call(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> Any:
        """The answer's JSON."""
        headers = {"Authorization": f"Bearer {KEY}"} | (headers or {})
        request = urllib.request.Request(self._address + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def start_ranking(self) -> str:
        """Submit a long ranking and wait until it runs."""
        body = json.dumps({"layer": "layer1", "activate": False}).encode()
        job: str = self.call("/rank-neurons", body, {"Content-Type": "application/json"})["id"]
        while not self.call(f"/rank-neurons/{job}", method="GET")["progress"]["done"]:
            time.sleep(0.2)
        return job

    def cancel(self, job: str) -> None:
        """Cancel a ranking."""
        self.call(f"/rank-neurons/{job}", method="DELETE")

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait(30)


if __name__ == "__main__":
    main()
