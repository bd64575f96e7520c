"""Where the time of a request goes, by sampling a server under load (py-spy; pip install 'ig-defense[bench]').

    python benchmarks/profile_requests.py [--connections 32] [--seconds 10]

Every sample of a thread that runs counts for the innermost of the places below that is on its stack. The event loop's
share and the device thread's are of wall-clock time: together they can be up to two cores.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import write_results
from peers.load import saturate
from server import igd_server

from models import models, sample_files, settings_of

RATE = 500
PLACES = {  # the name that is printed: a pattern of stack frames, innermost first
    "device: trunk, masks, tails (OpenVINO)": r"infer \(openvino|\(service/openvino_",
    "device: noise and pixels": r"\(service/predictor|\(service/passes",
    "device: batch, hand over": r"batching.py:.*|_worker \(concurrent",
    "loop: decode the PNG": r"decode_image|Decoder\.",
    "loop: JSON of the answer": r"prediction_json|_most_probable|render \(starlette",
    "loop: send the answer": r"RequestResponseCycle.send|Response.__call__|send_with_id|Connection._write",
    "loop: queue and results": r"Batcher\.",
    "loop: read, check, limits, metrics": r"service/(?!server)",
    "loop: HTTP parser, tasks, sockets (uvicorn, uvloop)": r".",
}


def main() -> None:
    """Profile both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=10)
    arguments = parser.parse_args()
    rows = [
        row
        for name, model in models().items()
        for row in _profile(name, model, arguments.connections, arguments.seconds)
    ]
    write_results("profile_requests", rows)


def _profile(name: str, model: Path, connections: int, seconds: int) -> list[dict[str, Any]]:
    files = sample_files(model)
    with igd_server(model, **settings_of(model)) as server, tempfile.NamedTemporaryFile() as samples:
        saturate(server.url, connections, 2, bodies=files)
        with ThreadPoolExecutor(1) as client:
            load = client.submit(saturate, server.url, connections, seconds + 3, bodies=files)
            command = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(server.pid)]
            command += ["--duration", str(seconds), "--rate", str(RATE), "--threads", "--nonblocking"]
            subprocess.run([*command, "--format", "raw", "--output", samples.name], check=True, capture_output=True)
            requests_per_s = load.result().requests_per_s
        counts = _counts(Path(samples.name).read_text())
    return [
        {
            "model": name,
            "where": place,
            "us a request": 1e6 * counts[place] / (RATE * seconds) / requests_per_s,
            "share of a core": counts[place] / (RATE * seconds),
            "requests/s": requests_per_s,
        }
        for place in PLACES
    ]


def _counts(raw: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, number = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if "device" in thread or "MainThread" in thread:
            counts[_place("device" if "device" in thread else "loop", frames)] += int(number)
    return counts


def _place(thread: str, frames: list[str]) -> str:
    places = [(place, pattern) for place, pattern in PLACES.items() if place.startswith(thread)]
    for frame in reversed(frames):
        for place, pattern in places[:-1]:
            if re.search(pattern, frame):
                return place
    return places[-1][0]


if __name__ == "__main__":
    main()
