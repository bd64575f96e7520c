"""Real servers and real processes for the tests of the store."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from defense.importance import NeuronImportance
from importance_store import ConnectedStore, StoreUnavailable, open_store

PATIENCE_S = 20.0


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {PATIENCE_S:.0f} s"
        time.sleep(0.01)


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for what another thread or process does."""
    return wait_until


def answers(store: ConnectedStore) -> bool:
    try:
        store.ping()
    except StoreUnavailable:
        return False
    return True


@pytest.fixture
def make_importance() -> Callable[..., NeuronImportance]:
    """A factory: the scores follow from the seed."""

    def make(seed: int = 0, *, classes: int = 3, neurons: int = 8, digest: str = "sha256:toy") -> NeuronImportance:
        scores = torch.rand(classes, neurons, generator=torch.Generator().manual_seed(seed))
        return NeuronImportance(scores, method="lo-ir", layer="layer4", model_digest=digest, probe_set=f"seed {seed}")

    return make


class RedisServer:
    """Debian's redis-server on a loopback port, with an append-only file, to be killed and started again."""

    def __init__(self, directory: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        persistence = ["--dir", str(self._directory), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), *persistence, *self._flags]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._listening, "redis-server")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Start redis-server with flags of the test's own."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on PATH")
    with ExitStack() as servers:

        def start(*flags: str) -> RedisServer:
            directory = tmp_path / "redis"
            directory.mkdir()
            server = RedisServer(directory, *flags)
            servers.callback(server.kill)
            server.start()
            return server

        yield start


@pytest.fixture
def redis_server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """A real Redis."""
    return start_redis()


@pytest.fixture
def embedded_store(tmp_path: Path) -> Iterator[ConnectedStore]:
    """A store on an embedded server of its own."""
    with open_store(redis_url=None, data_dir=tmp_path / "data", model="toy") as store:
        yield store


class Backend:
    """One of the two servers that a store may run on, for the tests that must hold on both."""

    def __init__(self, data_dir: Path, redis: RedisServer | None) -> None:
        self._data_dir = data_dir
        self._redis = redis
        self._stores = ExitStack()

    def open(self, *, model: str = "toy", history: int = 20) -> ConnectedStore:
        url = self._redis.url if self._redis else None
        return self._stores.enter_context(
            open_store(redis_url=url, data_dir=self._data_dir, model=model, history=history)
        )

    def kill(self) -> None:
        """kill -9 of the server process."""
        if self._redis:
            self._redis.kill()
        else:
            os.kill(self._pid(), signal.SIGKILL)

    def revive(self, store: ConnectedStore) -> None:
        """Start the server again, or wait until the embedded one did so by itself."""
        if self._redis:
            self._redis.start()
        wait_until(lambda: answers(store), "the server's return")

    def close(self) -> None:
        self._stores.close()

    def _pid(self) -> int:
        with self.open() as store, store.new_client() as client:
            return int(client.info("server")["process_id"])


@pytest.fixture(params=["embedded", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """The embedded server, then a real Redis."""
    redis = request.getfixturevalue("redis_server") if request.param == "redis" else None
    backend = Backend(tmp_path / "data", redis)
    yield backend
    backend.close()


@pytest.fixture
def store(backend: Backend) -> ConnectedStore:
    """An empty store of the model "toy"."""
    return backend.open()


class Child:
    """A process of ``child.py``; ``lines`` are what it said so far."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid = pid
        self._output = output

    @property
    def lines(self) -> list[str]:
        said = self._output.read_text() if self._output.exists() else ""
        return said.splitlines() if said.endswith("\n") else said.splitlines()[:-1]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def child_factory() -> Iterator[subprocess.Popen[str]]:
    """Imports torch once and forks from then on: a new process each time would take seconds."""
    command = [sys.executable, str(Path(__file__).with_name("child.py"))]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as factory:
        yield factory
        assert factory.stdin is not None
        factory.stdin.close()


@pytest.fixture
def start_child(child_factory: subprocess.Popen[str], tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Run a function of ``child.py`` in a process of its own."""
    children: list[Child] = []

    def start(function: str, **arguments: object) -> Child:
        assert child_factory.stdin is not None and child_factory.stdout is not None
        output = tmp_path / f"child-{len(children)}"
        order = {"function": function, "output": str(output), "arguments": arguments}
        child_factory.stdin.write(json.dumps(order) + "\n")
        child_factory.stdin.flush()
        children.append(Child(int(child_factory.stdout.readline()), output))
        return children[-1]

    yield start
    for child in children:
        if Path(f"/proc/{child.pid}").exists():
            child.kill()
