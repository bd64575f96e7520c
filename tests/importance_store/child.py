"""Processes for the tests to kill: forks one per line of JSON on stdin, and prints its id.

A child runs one of the functions below, which yields what it has to say; each line is written at
once to the file ``output``, so that it was said before whatever the test does next.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from defense.importance import NeuronImportance
from importance_store import VersionConflict, open_store

# 0.8 MB, so that many kills fall into the upload.
IMPORTANCE = NeuronImportance(torch.rand(100, 2048), method="lo-ir", layer="layer4")


def publish_forever(url: str, history: int) -> Iterator[str]:
    with open_store(redis_url=url, data_dir=Path(), model="toy", history=history) as store:
        while True:
            yield store.publish(IMPORTANCE)


def publish_at(url: str, expected_active: str | None, moment: float) -> Iterator[str]:
    """Publish by compare-and-set at a moment that rivals share."""
    with open_store(redis_url=url, data_dir=Path(), model="toy") as store:
        time.sleep(max(0.0, moment - time.time()))
        try:
            yield "won " + store.publish(IMPORTANCE, expected_active=expected_active)
        except VersionConflict:
            yield "lost"


def run_embedded_server(data_dir: str) -> Iterator[str]:
    """Publish one version, say it and the server's process id, and stay."""
    with open_store(redis_url=None, data_dir=Path(data_dir), model="toy") as store, store.new_client() as client:
        yield store.publish(IMPORTANCE)
        yield str(client.info("server")["process_id"])
        time.sleep(600)


def _run(order: dict[str, Any]) -> None:
    with Path(order["output"]).open("w", buffering=1) as output:
        for line in globals()[order["function"]](**order["arguments"]):
            output.write(line + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps by itself
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _run(json.loads(line))
            finally:
                os._exit(0)
        print(pid, flush=True)
