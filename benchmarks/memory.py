"""The server's resident memory after its start, after 100,000 requests and after three times 1,000 abandoned ones (f).

python benchmarks/memory.py [--requests 100000]
"""

import argparse
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from measure import plot_lines, write_results
from peers.connection import request_bytes
from peers.load import saturate
from server import Server, igd_server

from models import BUNDLED, sample_files

ABANDONED, TIMES = 1000, 3  # once would not tell what grows with every request from what is needed once
STEP_S = 3.0


def main() -> None:
    """Load the bundled model's server, and look at its memory meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    arguments = parser.parse_args()
    files = sample_files(BUNDLED)
    with igd_server(BUNDLED) as server:
        rows = [_row(server, "started")]
        curve = [(0.0, server.rss_mb)]
        while (done := _answered(server)) < arguments.requests:
            saturate(server.url, 64, STEP_S, bodies=files)
            curve.append((done, server.rss_mb))
            if len(rows) == 1 and _answered(server) > arguments.requests / 10:
                rows.append(_row(server, "a tenth of them"))
        rows.append(_row(server, "all of them"))
        for i in range(1, 1 + TIMES):
            _abandon(server, files)
            rows.append(_row(server, f"{i * ABANDONED} abandoned requests later"))
        saturate(server.url, 64, STEP_S, bodies=files)
        rows.append(_row(server, "some more"))
        assert server.metrics()["igd_in_flight"] == 0
    write_results("memory", rows)
    plot_lines("memory", {"resident memory": curve}, xlabel="requests answered", ylabel="MiB")


def _answered(server: Server) -> float:
    return _counted(server, "ok")


def _counted(server: Server, outcome: str) -> float:
    return server.metrics().get(f'igd_requests_total{{endpoint="classify",outcome="{outcome}"}}', 0)


def _row(server: Server, when: str) -> dict[str, Any]:
    counts = {"requests answered": int(_answered(server)), "client left": int(_counted(server, "client_error"))}
    row = {"when": when, **counts, "resident MiB": round(server.rss_mb, 1)}
    print(row, flush=True)
    return row


def _abandon(server: Server, files: Path) -> None:
    """Send whole requests, and leave without waiting for the answers, while the server has others to answer."""
    parts = urlsplit(server.url)
    request = request_bytes(server.url, "image/png", next(files.iterdir()).read_bytes())
    with ThreadPoolExecutor(1) as threads:
        others = threads.submit(saturate, server.url, 64, STEP_S, bodies=files)
        time.sleep(STEP_S / 6)
        for _ in range(ABANDONED):
            with socket.create_connection((parts.hostname or "", parts.port or 0)) as connection:
                connection.sendall(request)
        others.result()
    time.sleep(1)


if __name__ == "__main__":
    main()
