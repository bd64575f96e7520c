"""The open-loop client, a program of its own: requests leave when they are due, answered or not.

A loop of its own on epoll, without tasks and futures, since the client shares the server's processors. It sleeps in
select(), which takes microseconds: epoll's own timeout, and so asyncio's and uvloop's timers, are whole milliseconds.
"""

import json
import random
import select
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peers.connection import Connection, request_bytes


class OpenLoop:
    """Sends what is due over connections that are free, and notes what comes back.

    Attributes:
        statuses: of all answers. latencies_s: of those with 2xx, from when their request was due.
        late_s: from when a request was due until it was sent.
    """

    def __init__(self, address: tuple[str, int], requests: list[bytes], max_connections: int) -> None:
        self._address, self._requests, self._max = address, requests, max_connections
        self._all: dict[int, Connection] = {}
        self._free: deque[Connection] = deque()
        self._waiting: deque[float] = deque()
        self._epoll = select.epoll()
        self._turn = 0
        self.statuses: list[int] = []
        self.latencies_s: list[float] = []
        self.late_s: list[float] = []

    @property
    def unanswered(self) -> int:
        """Requests that wait for a connection or an answer."""
        return len(self._waiting) + len(self._all) - len(self._free)

    def open(self, count: int) -> None:
        """Connect before the clock runs."""
        self._free.extend([self._connect() for _ in range(count)])

    def send(self, due_s: float) -> None:
        """A request is due: over the connection that has been free for longest, so that none is closed as idle."""
        if not self._free and len(self._all) >= self._max:
            self._waiting.append(due_s)
            return
        connection = self._free.popleft() if self._free else self._connect()
        self._turn = (self._turn + 1) % len(self._requests)
        try:
            connection.send(self._requests[self._turn], due_s)
        except ConnectionError:
            self._close(connection)
        self.late_s.append(time.perf_counter() - due_s)

    def listen(self, until_s: float) -> None:
        """Take answers: until then, or the next that come."""
        wait_s = max(0.0, until_s - time.perf_counter())
        if select.select([self._epoll], [], [], wait_s)[0]:
            for descriptor, _ in self._epoll.poll(0):
                self._take(self._all[descriptor])

    def _take(self, connection: Connection) -> None:
        due_s = connection.due_s
        try:
            status = connection.receive()
        except ConnectionError:
            self._close(connection)
            return
        if status is None or due_s is None:
            return
        self.statuses.append(status)
        if 200 <= status < 300:
            self.latencies_s.append(time.perf_counter() - due_s)
        self._free.append(connection)
        if self._waiting:
            self.send(self._waiting.popleft())

    def _connect(self) -> Connection:
        connection = Connection(self._address)
        self._all[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLIN)
        return connection

    def _close(self, connection: Connection) -> None:
        del self._all[connection.socket.fileno()]
        connection.socket.close()
        if connection in self._free:
            self._free.remove(connection)


def poisson_times(rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds from the start, at random and independent of each other."""
    generator = random.Random(seed)
    times = [generator.expovariate(rate)]
    while times[-1] < seconds:
        times.append(times[-1] + generator.expovariate(rate))
    return times[:-1]


def run(
    url: str,
    rate: float,
    seconds: float,
    bodies: str,
    content_type: str,
    seed: int,
    connections: int,
    timeout_s: float,
    ahead: int,
) -> dict[str, Any]:
    """What ``load.offered`` reports, but for the CPU seconds."""
    parts = urlsplit(url)
    files = sorted(path for path in Path(bodies).iterdir() if path.is_file())
    requests = [request_bytes(url, content_type, path.read_bytes()) for path in files]
    loop = OpenLoop((parts.hostname or "127.0.0.1", parts.port or 80), requests, connections)
    loop.open(min(connections, max(16, ahead)))
    times = poisson_times(rate, seconds, seed)
    started_s = time.perf_counter()
    for _ in range(ahead):
        loop.send(started_s)
    loop.late_s.clear()
    for at_s in times:
        while time.perf_counter() < started_s + at_s:
            loop.listen(started_s + at_s)
        loop.send(started_s + at_s)
    while time.perf_counter() < started_s + seconds:
        loop.listen(started_s + seconds)
    ok_in_time = len(loop.latencies_s)
    give_up_s = started_s + seconds + timeout_s
    while loop.unanswered and time.perf_counter() < give_up_s:
        loop.listen(give_up_s)
    return report(loop, ahead + len(times)) | {"ok_in_time": ok_in_time}


def report(loop: OpenLoop, due: int) -> dict[str, Any]:
    """Counts and percentiles; what was neither answered 2xx nor rejected is an error."""
    ok = len(loop.latencies_s)
    rejected = sum(status in (429, 503) for status in loop.statuses)
    counts = {"offered": due, "ok": ok, "rejected": rejected, "errors": due - ok - rejected}
    return counts | {
        "p50_ms": percentile_ms(loop.latencies_s, 50),
        "p99_ms": percentile_ms(loop.latencies_s, 99),
        "late_p99_ms": percentile_ms(loop.late_s, 99),
    }


def percentile_ms(values_s: list[float], percent: int) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values_s:
        return float("nan")
    return 1e3 * sorted(values_s)[max(0, -(-len(values_s) * percent // 100) - 1)]


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
