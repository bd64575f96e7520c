"""Replicas on one real Redis, and what becomes of them when it goes away: servers in processes of their own."""

import io
import re
import signal
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from defense import SplitClassifier, leave_one_out_importance, load_classifier, load_importance, load_probe_set
from importance_store import open_store

ADMIN = {"Authorization": "Bearer sesame"}
IMAGE = {"Content-Type": "image/png"}
ACTIVATION_S = 5  # the requirement is 1 s; the rest is for a busy machine


def png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def classify(client):
    return client.post("/classify", content=png(), headers=IMAGE)


def served_by(client):
    return client.get("/model").json()["importance_version"]


def store_up(client):
    return float(re.search(r"^igd_store_up (\S+)$", client.get("/metrics").text, re.MULTILINE)[1])


def assert_is_problem(response, status, *fragments):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    for fragment in fragments:
        assert fragment in response.json()["detail"]


@pytest.fixture
def replicas(redis, start_igd, tiny_model):
    """Clients of two servers that share an empty Redis."""
    redis.start()
    servers = [start_igd.serve(tiny_model, "--redis-url", redis.url, IGD_ADMIN_KEY="sesame") for _ in range(2)]
    with servers[0].client() as one, servers[1].client() as two:
        yield [one, two]


@pytest.fixture
def store(redis, replicas):
    with open_store(redis_url=redis.url, data_dir=Path("unused"), model="tiny") as store:
        yield store


class Traffic:
    """Classifies on every replica, one request after the other, for as long as the block lasts."""

    def __init__(self, replicas):
        self.answers = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._loop, args=(replica,)) for replica in replicas]

    def _loop(self, replica):
        with httpx.Client(base_url=replica.base_url, timeout=30, trust_env=False) as client:
            while not self._ending.is_set():
                self.answers.append((replica, classify(client)))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def versions(self, replica):
        """What the answers of a replica were made with; every one of them must be an answer."""
        assert all(answer.status_code == 200 for _, answer in self.answers), self.answers
        return {answer.json()["importance_version"] for asked, answer in self.answers if asked is replica}


def test_replicas_that_start_together_publish_what_they_ship_once(replicas, store):
    (version,) = [version.version for version in store.versions()]

    assert [served_by(replica) for replica in replicas] == [version, version]


def test_a_version_activated_on_one_replica_is_served_by_both_without_a_failed_request(replicas, store, until):
    before = store.active_version()
    after = store.publish(store.load().importance, activate=False)

    with Traffic(replicas) as traffic:
        until(lambda: all(traffic.versions(replica) for replica in replicas), "traffic")
        activated = time.monotonic()
        assert replicas[0].post(f"/importance/{after}/activate", headers=ADMIN).status_code == 200
        for replica in replicas:
            until(lambda r=replica: served_by(r) == after, "the activation")
        elapsed = time.monotonic() - activated
        until(lambda: all(after in traffic.versions(replica) for replica in replicas), "traffic under the new version")

    assert elapsed < ACTIVATION_S
    assert [traffic.versions(replica) for replica in replicas] == [{before, after}, {before, after}]


def test_predictions_go_on_while_redis_is_killed_and_its_return_is_noticed(redis, replicas, store, until):
    before = store.active_version()
    after = store.publish(store.load().importance, activate=False)
    with Traffic(replicas) as traffic:
        until(lambda: all(traffic.versions(replica) for replica in replicas), "traffic")
        redis.kill()
        for replica in replicas:
            until(lambda r=replica: store_up(r) == 0, "the loss being noticed")
            ready = replica.get("/health/ready")
            assert ready.status_code == 200 and ready.json()["store_up"] is False
            listed = replica.get("/importance").json()
            assert listed["store_up"] is False and listed["serving"] == before and "store" in listed["problem"]
            assert_is_problem(replica.get(f"/importance/{before}"), 503, "does not answer", "IGD_REDIS_URL")
            answer = replica.post(f"/importance/{after}/activate", headers=ADMIN)
            assert_is_problem(answer, 503, "does not answer")
            assert int(answer.headers["retry-after"]) >= 1

        redis.start()
        store.activate(after)
        for replica in replicas:
            until(lambda r=replica: served_by(r) == after, "the version that was activated in between")
            until(lambda r=replica: store_up(r) == 1, "the return being noticed")
            assert replica.get("/importance").json()["problem"] is None

    assert all({before} <= traffic.versions(replica) <= {before, after} for replica in replicas)


def test_a_server_that_starts_without_redis_waits_for_it(redis, start_igd, tiny_model, until):
    server = start_igd.serve(tiny_model, "--redis-url", redis.url)
    with server.client() as client:
        assert client.get("/health/live").status_code == 200
        assert_is_problem(client.get("/health/ready"), 503, f"127.0.0.1:{redis.port} does not answer", "IGD_REDIS_URL")
        assert_is_problem(classify(client), 503, "not ready")
        assert client.get("/importance").json()["store_up"] is False
        assert store_up(client) == 0

        redis.start()

        until(lambda: client.get("/health/ready").status_code == 200, "readiness")
        assert classify(client).status_code == 200
        until(lambda: store_up(client) == 1)


def test_a_server_that_a_late_redis_refuses_ends_instead_of_waiting_for_ever(redis, start_igd, tiny_model):
    server = start_igd.serve(tiny_model, "--redis-url", redis.url.replace("://", "://:guess@"))
    assert server.url

    redis.start("--requirepass", "sesame")

    assert server.ended() == 1
    assert "refused us" in server.output and "guess" not in server.output


def test_without_importance_nothing_is_served_until_the_model_is_ranked(start_igd, make_model, tmp_path, until):
    model = make_model("bare", importance=False)
    data_dir = ("--data-dir", tmp_path / "store")
    with start_igd.serve(model, *data_dir).client() as client:
        assert_is_problem(client.get("/health/ready"), 503, "no importance for model 'tiny'", "igd rank")
        assert_is_problem(classify(client), 503, "igd rank")  # and never an undefended prediction
        assert served_by(client) is None

        ranking = start_igd("rank", "--model", model, *data_dir)

        assert ranking.ended() == 0, ranking.output
        until(lambda: client.get("/health/ready").status_code == 200, "readiness")
        assert classify(client).json()["importance_version"] == ranking.output.split()[-1]


@contextmanager
def active(store, importance):
    """Activate an importance behind the server's back; in the end the one before."""
    before = store.active_version()
    yield store.publish(importance)
    store.activate(before)


def test_an_importance_of_other_weights_is_refused_and_the_old_one_goes_on(replicas, store, make_model, until):
    before = store.active_version()
    other = load_importance(make_model("other", seed=1))

    with active(store, other) as foreign, Traffic(replicas) as traffic:
        for replica in replicas:
            until(lambda r=replica: traffic.versions(r), "traffic")
            until(lambda r=replica: r.get("/importance").json()["problem"], "the refusal")
            listed = replica.get("/importance").json()
            assert (listed["serving"], listed["active"]) == (before, foreign)
            assert foreign in listed["problem"] and "made for weights" in listed["problem"]
            assert replica.get("/health/ready").status_code == 200

    for replica in replicas:
        assert traffic.versions(replica) == {before}
        until(lambda r=replica: r.get("/importance").json()["problem"] is None, "the problem being over")


def test_an_importance_of_another_layer_is_refused_and_the_old_one_goes_on(replicas, store, tiny_model, until):
    before = store.active_version()
    split = SplitClassifier(load_classifier(tiny_model), "layer1")

    with active(store, leave_one_out_importance(split, load_probe_set(tiny_model).batches())):
        for replica in replicas:
            until(lambda r=replica: r.get("/importance").json()["problem"], "the refusal")
            assert served_by(replica) == before and classify(replica).status_code == 200


def receive(connection, ending):
    received = b""
    while not received.endswith(ending):
        data = connection.recv(65_536)
        assert data, f"closed after {received}"
        received += data
    return received


@pytest.mark.parametrize(("number", "fresh"), [(signal.SIGTERM, True), (signal.SIGINT, False)], ids=["TERM", "INT"])
def test_requests_in_flight_are_answered_before_the_process_ends(number, fresh, start_igd, tiny_model, until):
    server, image = start_igd.serve(tiny_model, fresh=fresh), png()
    address = (httpx.URL(server.url).host, httpx.URL(server.url).port)
    head = ["POST /classify HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {len(image)}"]
    with ExitStack() as connections:
        idle, *in_flight = [connections.enter_context(socket.create_connection(address, timeout=30)) for _ in range(21)]
        for connection in in_flight:
            connection.sendall("\r\n".join([*head, "Expect: 100-continue", "", ""]).encode())
            assert b"100 Continue" in receive(connection, b"\r\n\r\n")  # it waits for the body now

        server.signal(number)
        until(lambda: "Shutting down" in server.output, "the beginning of the end")
        for connection in in_flight:
            connection.sendall(image)
            assert receive(connection, b"}").startswith(b"HTTP/1.1 200 OK")

        assert idle.recv(1) == b""  # closed
        assert server.ended() == 0
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(address, timeout=5)
    assert "Traceback" not in server.output


def test_readiness_goes_first_and_what_comes_before_that_is_noticed_is_answered(start_igd, tiny_model, until):
    server = start_igd.serve(tiny_model, "--drain-delay-s", "3")
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/health/ready").status_code == 200

        server.signal(signal.SIGTERM)
        until(lambda: client.get("/health/ready").status_code == 503, "readiness going")
        assert classify(client).status_code == 200
        assert client.get("/health/live").status_code == 200
        assert_is_problem(client.get("/health/ready"), 503, "shutting down")
    assert server.ended() == 0


@pytest.mark.parametrize("password", ["", ":hunter2@", "igd:hunter2@"])
def test_a_refused_password_ends_the_server_with_a_sentence_and_stays_secret(redis, start_igd, tiny_model, password):
    redis.start("--requirepass", "sesame")

    server = start_igd.serve(tiny_model, IGD_REDIS_URL=redis.url.replace("://", f"://{password}"))

    assert server.ended() == 1
    assert f"igd: the store at 127.0.0.1:{redis.port} refused us" in server.output
    assert "check user and password in IGD_REDIS_URL" in server.output
    assert "hunter2" not in server.output and "Traceback" not in server.output


def test_a_url_that_is_none_ends_the_server_with_a_sentence(start_igd, tiny_model):
    server = start_igd.serve(tiny_model, IGD_REDIS_URL="redis://:hunter/2@host:6379")

    assert server.ended() == 1
    assert "expected IGD_REDIS_URL like redis://" in server.output
    assert "hunter" not in server.output and "Traceback" not in server.output


def test_a_model_directory_that_is_none_ends_the_server_with_a_sentence(start_igd, tmp_path):
    server = start_igd.serve(tmp_path / "nowhere")

    assert server.ended() == 1
    assert "igd: expected a model directory with model.toml at" in server.output
    assert "Traceback" not in server.output


def test_a_port_that_is_taken_ends_the_server(start_igd, tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = start_igd.serve(tiny_model, "--port", taken.getsockname()[1])

        assert server.ended() == 1
    assert "address already in use" in server.output and "Traceback" not in server.output
