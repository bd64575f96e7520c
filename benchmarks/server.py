"""``igd serve`` as the benchmarks start it: a process of its own, on a free port, with a store of its own."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADMIN_KEY = "benchmark"


class Server:
    """A running server.

    Args:
        before: Python code that its process runs first. settings: of ``igd serve``.
    """

    def __init__(self, model: Path, data_dir: Path, *, before: str = "", **settings: object) -> None:
        own = {"IGD_ADMIN_KEY": ADMIN_KEY, "IGD_DATA_DIR": str(data_dir), "IGD_MODEL": str(model)}
        own |= {f"IGD_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-c", f"{before}\nfrom igd.cli import main\nmain()", "serve", "--port", "0"]
        self._process = subprocess.Popen(
            command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout
        line = next(line for line in self._process.stdout if "listens on" in line)
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        self.address = line.split("listens on ")[1].split(",")[0]
        self.url = f"{self.address}/classify"

    def cpu_s(self) -> float:
        """Processor time that it has had, of all threads and cores."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def call(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> Any:
        """The answer's JSON."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"} | (headers or {})
        request = urllib.request.Request(self.address + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def metrics(self) -> dict[str, float]:
        """/metrics as {series: value}."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (li.rsplit(" ", 1) for li in lines if not li.startswith("#"))}

    def mean_batch_since(self, before: dict[str, float]) -> float:
        """Images in a batch, of those since these ``metrics``."""
        now = self.metrics()
        images, batches = (now[key] - before[key] for key in ("igd_batch_size_sum", "igd_batch_size_count"))
        return images / max(1, batches)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def rss_mb(self) -> float:
        """Its resident memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


@contextmanager
def igd_server(model: Path, *, before: str = "", **settings: object) -> Iterator[Server]:
    """Serve a model directory until the block ends; see ``Server``."""
    with tempfile.TemporaryDirectory() as data_dir:
        server = Server(model, Path(data_dir), before=before, **({"worker": False} | settings))
        try:
            yield server
        finally:
            server.stop()
