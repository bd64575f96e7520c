"""Three replicas on one real Redis behind a real haproxy with the configuration that ships, under load.

What is observed is printed: python -m pytest -s tests/service/test_scaling_out.py
"""

import asyncio
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from importance_store import open_store

CONFIGURATION = Path(__file__).parents[2] / "docker/haproxy/haproxy.cfg"
REPLICAS = 3
CONNECTIONS = 12
DRAIN_DELAY_S = 4  # the checks need 1.5 s to notice, more on a busy machine


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


class Proxy:
    """haproxy in front of replicas at given ports."""

    def __init__(self, ports, log):
        own, metrics = free_ports(2)
        self.url, self._metrics = f"http://127.0.0.1:{own}", f"http://127.0.0.1:{metrics}/metrics"
        replicas = {f"IGD_REPLICA_{i}": f"127.0.0.1:{port}" for i, port in enumerate(ports, 1)}
        addresses = {"IGD_BIND": f"127.0.0.1:{own}", "IGD_PROXY_METRICS_BIND": f"127.0.0.1:{metrics}"}
        with log.open("wb") as output:
            command = ["haproxy", "-db", "-f", str(CONFIGURATION)]
            self._process = subprocess.Popen(
                command, env=os.environ | replicas | addresses, stdout=output, stderr=output
            )

    def up(self):
        """Which replicas requests are sent to, 0 to 2."""
        try:
            text = httpx.get(self._metrics, trust_env=False).text
        except httpx.TransportError:
            return set()
        found = re.findall(r'haproxy_server_status\{proxy="replicas",server="replica(\d)",state="UP"\} 1', text)
        return {int(number) - 1 for number in found}

    def end(self):
        self._process.terminate()
        self._process.wait(30)


@dataclass(frozen=True)
class Request:
    """One request of the load: when it began and ended, and what came of it (``version`` if all went well)."""

    began_at: float
    ended_at: float
    version: str | None
    problem: str | None


class Load:
    """Classifies over so many connections, each one request after the other, for as long as the block lasts."""

    def __init__(self, url):
        self.requests = []
        self._url, self._ending = url, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        async with httpx.AsyncClient(base_url=self._url, timeout=60, trust_env=False) as client:
            await asyncio.gather(*(self._loop(client) for _ in range(CONNECTIONS)))

    async def _loop(self, client):
        image = png()
        while not self._ending.is_set():
            began_at, version, problem = time.monotonic(), None, None
            try:
                answer = await client.post("/classify", content=image, headers={"Content-Type": "image/png"})
                if answer.status_code == 200:
                    version = answer.json()["importance_version"]
                else:
                    problem = f"{answer.status_code} {answer.text[:100]}"
            except httpx.TransportError as error:
                problem = repr(error)
            self.requests.append(Request(began_at, time.monotonic(), version, problem))

    @property
    def failed(self):
        return [request for request in self.requests if request.problem]

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ending.set()
        self._thread.join()


class Cluster:
    """The replicas, the proxy, and the store that they share."""

    def __init__(self, start_igd, redis, model, until, directory):
        self._start, self._redis, self._model, self._until = start_igd, redis, model, until
        self.ports = free_ports(REPLICAS)
        self.servers = [self._serve(port) for port in self.ports]
        for server in self.servers:
            assert server.url
        self.proxy = Proxy(self.ports, directory / "haproxy.log")
        self.wait_for(range(REPLICAS))

    def _serve(self, port):
        flags = ("--port", port, "--redis-url", self._redis.url, "--drain-delay-s", DRAIN_DELAY_S)
        return self._start.serve(self._model, *flags, IGD_ADMIN_KEY="sesame")

    def start_again(self, number):
        self.servers[number] = self._serve(self.ports[number])

    def wait_for(self, replicas):
        self._until(lambda: self.proxy.up() == set(replicas), f"haproxy seeing {list(replicas)}")

    def served(self, number):
        with self.servers[number].client() as client:
            return client.get("/model").json()["importance_version"]


def _last(load, version):
    return max(request.began_at for request in load.requests if request.version == version)


@pytest.fixture
def cluster(start_igd, redis, tiny_model, until, tmp_path):
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not on PATH; on Debian and Ubuntu: apt install haproxy")
    redis.start()
    cluster = Cluster(start_igd, redis, tiny_model, until, tmp_path)
    yield cluster
    cluster.proxy.end()


def test_a_version_activated_under_load_is_served_by_all_replicas_without_a_failed_request(cluster, redis, until):
    with open_store(redis_url=redis.url, data_dir=Path("unused"), model="tiny") as store:
        before, after = store.active_version(), store.publish(store.load().importance, activate=False)

    with Load(cluster.proxy.url) as load:
        until(lambda: len(load.requests) > 200, "load")
        activated_at = time.monotonic()
        admin = {"Authorization": "Bearer sesame"}
        assert httpx.post(f"{cluster.proxy.url}/importance/{after}/activate", headers=admin).status_code == 200
        for number in range(REPLICAS):
            until(lambda n=number: cluster.served(n) == after, "the switch")
        loaded = len(load.requests)
        until(lambda: len(load.requests) > loaded + 200, "load under the new version")

    print(
        f"\nactivated under load: {len(load.requests)} requests, {len(load.failed)} failed, "
        f"the last one under the version before was sent {_last(load, before) - activated_at:.3f} s after"
    )
    assert load.failed == []
    assert {request.version for request in load.requests} == {before, after}
    assert {request.version for request in load.requests[-100:]} == {after}


def test_a_replica_killed_under_load_takes_only_its_requests_in_flight_with_it(cluster, until):
    with Load(cluster.proxy.url) as load:
        until(lambda: len(load.requests) > 200, "load")
        killed_at = time.monotonic()
        cluster.servers[1].signal(signal.SIGKILL)
        cluster.servers[1].ended()
        dead_at = time.monotonic()
        cluster.wait_for([0, 2])
        noticed_s = time.monotonic() - killed_at
        loaded = len(load.requests)
        until(lambda: len(load.requests) > loaded + 200, "load on the others")

    print(
        f"\nkilled under load: {len(load.requests)} requests, {len(load.failed)} failed, "
        f"out of haproxy's sight after {noticed_s:.2f} s"
    )
    assert len(load.failed) <= CONNECTIONS  # each connection has one request in flight
    for request in load.failed:
        assert request.began_at < dead_at and request.ended_at > killed_at, request
        # haproxy's answer, or none where it used a connection again: then clients are to try once more by themselves.
        # Or half an answer: its head and its body are two writes.
        cut_off = (
            "without sending a response" in request.problem
            or "without sending complete message body" in request.problem
        )
        assert request.problem.startswith("502") or cut_off, request


def test_replicas_restarted_one_by_one_under_load_fail_no_request(cluster, until):
    with Load(cluster.proxy.url) as load:
        until(lambda: len(load.requests) > 200, "load")
        began_at = time.monotonic()
        for number in range(REPLICAS):
            others = set(range(REPLICAS)) - {number}
            cluster.servers[number].signal(signal.SIGTERM)
            cluster.wait_for(others)
            assert cluster.servers[number].ended() == 0
            cluster.start_again(number)
            cluster.wait_for(range(REPLICAS))
        rolled_s = time.monotonic() - began_at
        loaded = len(load.requests)
        until(lambda: len(load.requests) > loaded + 200, "load on all")

    print(f"\nrolled under load: {len(load.requests)} requests, {len(load.failed)} failed, in {rolled_s:.1f} s")
    assert load.failed == []
