"""Real servers for the tests of the service: ``igd`` processes and a Redis to be killed."""

import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

PATIENCE_S = 30.0


def wait_until(condition: Callable[[], object], what: object = "the condition") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {PATIENCE_S:.0f} s"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Wait for what another process does."""
    return wait_until


class Igd:
    """An ``igd`` process and what it printed.

    Args:
        fresh: run ``python -m igd``; otherwise fork from a process that has imported torch, which saves seconds.
        before: code that a forked one runs first, to break something in it.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["igd.cli"])

    def __init__(
        self, log: Path, *arguments: object, fresh: bool = False, before: str = "", **environment: str
    ) -> None:
        self._log = log
        arguments = tuple(map(str, arguments))
        # One thread and no worker of its own: the tests share a small machine.
        environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "300", "IGD_WORKER": "false"} | environment
        self._process: subprocess.Popen[bytes] | multiprocessing.context.ForkServerProcess
        if fresh:
            with log.open("wb") as output:
                command = [sys.executable, "-m", "igd", *arguments]
                self._process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
        else:
            given = {"arguments": arguments, "environment": environment, "output": str(log), "before": before}
            script = str(Path(__file__).with_name("run_igd.py"))
            self._process = self._context.Process(target=runpy.run_path, args=(script, given))
            self._process.start()

    @property
    def output(self) -> str:
        return re.sub(" +", " ", self._log.read_text()) if self._log.exists() else ""

    @property
    def exit_code(self) -> int | None:
        process = self._process
        return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode

    @property
    def url(self) -> str:
        """Of a server; waits until it listens."""
        wait_until(lambda: "listens on" in self.output or self.exit_code is not None, "a server that listens")
        listens = re.search(r"listens on (http://\S+),", self.output)
        assert listens, f"it ended: {self.output}"
        return listens[1]

    def client(self) -> httpx.Client:
        """A client of this server, to be closed."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)

    def signal(self, number: int) -> None:
        if self.exit_code is None and self._process.pid:
            os.kill(self._process.pid, number)

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        wait_until(lambda: self.exit_code is not None, f"the end of {self._log}")
        assert self.exit_code is not None
        return self.exit_code


class StartIgd:
    """Starts ``igd`` processes, and ends them in the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[Igd] = []

    def __call__(self, *arguments: object, **options: object) -> Igd:
        """Any command; ``options`` are ``fresh`` and environment variables."""
        log = self._directory / f"igd-{len(self._processes)}.log"
        self._processes.append(Igd(log, *arguments, **options))  # type: ignore[arg-type]
        return self._processes[-1]

    def serve(self, model: Path, *arguments: object, **options: object) -> Igd:
        """A server on a free port, by default with an embedded store of its own."""
        data_dir = self._directory / f"data-{len(self._processes)}"
        flags = ("--model", model, "--port", 0, "--threads", 1, "--data-dir", data_dir)
        return self("serve", *flags, *arguments, **options)

    def end(self) -> None:
        """End all of them by whatever means."""
        for process in self._processes:
            process.signal(signal.SIGTERM)
        try:
            for process in self._processes:
                process.ended()
        finally:
            for process in self._processes:
                process.signal(signal.SIGKILL)


@pytest.fixture
def start_igd(tmp_path: Path) -> Iterator[StartIgd]:
    """Start ``igd`` processes."""
    start = StartIgd(tmp_path)
    yield start
    start.end()


@pytest.fixture(scope="module")
def module_igd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartIgd]:
    """Start ``igd`` processes that the tests of a module share."""
    start = StartIgd(tmp_path_factory.mktemp("igd"))
    yield start
    start.end()


class Redis:
    """Debian's redis-server on a loopback port, with an append-only file, to be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self, *flags: str) -> None:
        persistence = ["--dir", str(self._directory), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), *persistence, *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._listening, "redis-server")

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A real Redis, not started yet."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on PATH")
    directory = tmp_path / "redis"
    directory.mkdir()
    server = Redis(directory)
    yield server
    server.kill()
