"""A real Prometheus that scrapes one server and evaluates this repository's rules, in less time if asked."""

import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

RULES = Path(__file__).parents[2] / "docker/prometheus/rules"
SCRAPE_S = 5.0  # of docker/prometheus/prometheus.yml

_CONFIG = """
global: {{scrape_interval: {interval_ms:.0f}ms, evaluation_interval: {interval_ms:.0f}ms}}
rule_files: ["{directory}/rules/*.yml"]
scrape_configs:
  - job_name: ig-defense
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """What a running Prometheus says.

    Attributes:
        url: of its API. step_s: between two scrapes.
    """

    def __init__(self, url: str, step_s: float) -> None:
        self.url, self.step_s = url, step_s

    def api(self, path: str, **parameters: object) -> Any:
        """The data of an answer of the API."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def over_time(self, query: str, start: float, end: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Times and values of a query's first series where it has one: a share of no images is NaN."""
        found = self.api("query_range", query=query, start=start, end=end, step=self.step_s)["result"]
        values = np.array(found[0]["values"], float) if found else np.zeros((0, 2))
        values = values[~np.isnan(values[:, 1])]
        return values[:, 0], values[:, 1]

    def threshold(self, alert: str) -> float:
        """Of an alert whose expression is ``... > threshold``."""
        rules = [rule for group in self.api("rules")["groups"] for rule in group["rules"]]
        (query,) = (rule["query"] for rule in rules if rule["name"] == alert)
        return float(re.search(r"> ([\d.]+)", query)[1])

    def is_ready(self) -> bool:
        """Whether it answers, has loaded the rules, and has seen its target."""
        try:
            targets = self.api("targets")["activeTargets"]
        except (OSError, urllib.error.URLError):
            return False
        return bool(targets) and all(target["health"] == "up" for target in targets)


def accelerated(rules: str, speed_up: float) -> str:
    """The text of rules with every duration (all are whole minutes) divided."""
    return re.sub(r"\b(\d+)m\b", lambda minutes: f"{60_000 * int(minutes[1]) / speed_up:.0f}ms", rules)


@contextmanager
def watching(target: str, *, speed_up: float = 1.0) -> Iterator[Prometheus]:
    """Scrape a server's URL until the block ends; with ``speed_up``, as often in that much less time."""
    program = shutil.which("prometheus")
    if program is None:
        raise SystemExit("prometheus is not installed; on Debian and Ubuntu: apt install prometheus")
    with tempfile.TemporaryDirectory() as directory:
        flags = _prepare(Path(directory), target, speed_up)
        address = f"127.0.0.1:{_free_port()}"
        process = subprocess.Popen([program, *flags, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL)
        try:
            prometheus = Prometheus(f"http://{address}", SCRAPE_S / speed_up)
            _wait_for(prometheus)
            yield prometheus
        finally:
            process.terminate()
            process.wait()


def _prepare(directory: Path, target: str, speed_up: float) -> list[str]:
    (directory / "rules").mkdir()
    for path in RULES.glob("*.yml"):
        (directory / "rules" / path.name).write_text(accelerated(path.read_text(), speed_up))
    config = directory / "prometheus.yml"
    interval_ms = 1000 * SCRAPE_S / speed_up
    config.write_text(_CONFIG.format(interval_ms=interval_ms, directory=directory, target=urlsplit(target).netloc))
    return [f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"]


def _wait_for(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + 60
    while not prometheus.is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError("Prometheus has not seen its target within 60 s")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
