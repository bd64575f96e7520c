"""Pictures of the dashboards, from a real run: docs/dashboard-*.png.

    python benchmarks/dashboards.py [--seconds 170]

The bundled model with its worker, watched by a real Prometheus with this repository's rules: image files at a steady
rate, two ranking jobs (LO-IR, CD-IR), images attacked with PGD, a burst that is more than the queue takes, requests
that are no images, a longer ranking. So that minutes suffice, Prometheus scrapes every second and the rules' 5 minutes
are one. Then docker/grafana/draw.py draws what it knows.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from monitored import images
from monitored.client import Client, Pixels, send
from monitored.prometheus import watching
from peers.load import offered
from server import Server, igd_server

from models import BUNDLED, sample_files

REPOSITORY = Path(__file__).parents[1]
NUM_CLASSES = 10


def main() -> None:
    """Serve, send, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--data", type=Path, help="folder of the idx files (default: Debian's, else a download)")
    arguments = parser.parse_args()
    pixels, labels = images.test_images(arguments.data)
    attacked = images.pgd_on_undefended(pixels[:200], labels[:200])
    with igd_server(BUNDLED, worker=True) as server, watching(server.address, speed_up=5) as prometheus:
        began = time.time()
        steady = threading.Thread(target=_steady_traffic, args=(server, arguments.seconds))
        steady.start()
        _follow_the_plan(server, began, arguments.seconds, attacked, pixels[:256])
        steady.join()
        time.sleep(2 * prometheus.step_s)
        draw(prometheus.url, began, began + arguments.seconds)


def draw(prometheus: str, start: float, end: float) -> None:
    """Draw all dashboards into docs/."""
    script = REPOSITORY / "docker/grafana/draw.py"
    times = ["--from", str(start), "--to", str(end), "--output", str(REPOSITORY / "docs")]
    subprocess.run([sys.executable, script, prometheus, *times], check=True)


def _steady_traffic(server: Server, seconds: float) -> None:
    print(offered(server.url, 15, seconds, bodies=sample_files(BUNDLED)))


def _follow_the_plan(server: Server, began: float, seconds: float, attacked: Pixels, many: Pixels) -> None:
    """Each thing at its share of the time; what takes longer than until the next one delays it."""
    plan: list[tuple[float, Callable[[], object]]] = [
        (0.10, lambda: rank(server, method="lo-ir")),
        (0.25, lambda: rank(server, method="cd-ir")),
        (0.50, lambda: _send_attacked(server, attacked, 0.18 * seconds)),
        (0.75, lambda: _burst(server, many, 0.04 * seconds)),
        (0.82, lambda: _send_no_images(server, 30)),
        (0.83, lambda: rank(server, method="lo-ir", layer="layer2", activate=False)),
    ]
    for share, act in plan:
        time.sleep(max(0.0, began + share * seconds - time.time()))
        print(f"{time.time() - began:.0f} s", act(), flush=True)


def rank(server: Server, **request: object) -> str:
    """Submit a ranking; its id."""
    body = json.dumps(request).encode()
    job: str = server.call("/rank-neurons", body, {"Content-Type": "application/json"})["id"]
    return job


def _send_attacked(server: Server, attacked: Pixels, seconds: float) -> int:
    order, _ = send(Client(server.address, NUM_CLASSES), attacked, number=round(15 * seconds), per_s=15, at_once=1)
    return len(order)


def _burst(server: Server, pixels: Pixels, seconds: float) -> int:
    """Eight clients send all these images at once, again and again; how many requests were refused."""
    ends = time.monotonic() + seconds

    def one(number: int) -> int:
        client, refused = Client(server.address, NUM_CLASSES), 0
        while time.monotonic() < ends:
            try:
                client.classify(np.roll(pixels, number))
            except RuntimeError:  # 429
                refused += 1
                time.sleep(0.05)
        return refused

    with ThreadPoolExecutor(8) as clients:
        return sum(clients.map(one, range(8)))


def _send_no_images(server: Server, number: int) -> int:
    for _ in range(number):
        try:
            server.call("/classify", b"no image", {"Content-Type": "image/png"})
        except urllib.error.HTTPError as error:
            status = error.code
    return status


if __name__ == "__main__":
    main()
