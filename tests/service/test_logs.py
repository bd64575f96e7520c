"""Logs and traces of real servers and workers: what is in them, and what must not be."""

import base64
import gzip
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import structlog
from PIL import Image

from service.answers import BatchRun, Classified
from service.request_log import SLOW_LINES_PER_S, RequestLog
from service.trace_context import trace_id_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
PNG = {"Content-Type": "image/png"}


def png(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def lines(process):
    """What it logged; nothing else may be on its standard error, and the banner on standard output is no JSON."""
    return [json.loads(line) for line in process.output.splitlines() if line.startswith("{")]


def requests(process):
    return [line for line in lines(process) if line["event"] == "request"]


def test_every_request_has_a_line_with_its_timings_if_asked_for(start_igd, tiny_model, until):
    server = start_igd.serve(tiny_model, "--max-batch-size", 2, IGD_ACCESS_LOG="true")
    with server.client() as client:
        client.post("/classify?top=1", content=png(), headers=PNG | TRACEPARENT | {"X-Request-ID": "mine"})
        client.post("/classify", files=[("images", (f"{i}.png", png(i))) for i in range(3)])
        client.post("/v2/models/tiny/infer", json={"inputs": []})
        client.get("/a%0Apath", headers={"X-Request-ID": "not found"})
    until(lambda: len(requests(server)) == 4, "the lines")

    one, three, refused, missing = requests(server)
    assert {"timestamp", "level", "logger", "event"} <= set(one)
    assert (one["request_id"], one["trace_id"], one["status"], one["path"]) == ("mine", TRACE, 200, "/classify")
    assert (one["images"], one["batch_size"]) == (1, 1) and isinstance(one["batch"], str)
    parts = [one[f"{part}_ms"] for part in ("read", "queue", "trunk", "tail")]
    assert min(parts) > 0 and sum(parts) < one["total_ms"]
    assert three["images"] == 3 and len(three["batch"]) == 2 and "trace_id" not in three
    assert refused["status"] == 422 and "batch" not in refused
    assert (missing["status"], missing["path"]) == (404, "/a%0Apath") and missing["request_id"] != "not found"


def test_by_default_only_slow_and_failed_requests_have_a_line(start_igd, tiny_model, until):
    quiet = start_igd.serve(tiny_model)
    slow = start_igd.serve(tiny_model, "--slow-request-s", "1e-5")
    failing = start_igd.serve(tiny_model, "--deadline-s", "1e-6")
    for server in (quiet, slow, failing):
        with server.client() as client:
            answer = client.post("/classify", content=png(), headers=PNG | TRACEPARENT)
    assert answer.status_code == 504 and answer.json()["trace_id"] == TRACE

    until(lambda: requests(slow) and requests(failing), "the lines")
    (line,) = requests(slow)
    assert (line["level"], line["status"]) == ("info", 200) and line["queue_ms"] > 0
    (line,) = requests(failing)
    assert (line["level"], line["status"], line["trace_id"]) == ("error", 504, TRACE)
    assert requests(quiet) == [] and any("serving importance" in line["event"] for line in lines(quiet))


def test_under_overload_few_of_the_slow_requests_have_a_line():
    log = RequestLog(slow_s=0.1)
    classified = Classified([None], [BatchRun(1, 1.0, 2.0, {"trunk": 0.5, "tail": 0.5})], 0.5)
    scope = {"method": "POST", "path": "/classify", "state": {"classified": classified, "arrived_at": 0.0}}

    with structlog.testing.capture_logs() as written:
        for _ in range(1000):
            log.end(scope, 200, 2.0)

    assert SLOW_LINES_PER_S <= len(written) <= 2 * SLOW_LINES_PER_S  # twice, if a second began meanwhile
    assert written[0]["queue_ms"] == 500 and written[0]["total_ms"] == 2000


WRITE = """
import logging, sys
from service.logs import configure_logging
configure_logging("info", sys.argv[1])
def fail(key, image):
    raise ValueError("it failed")
try:
    fail("hunter2", b"pixels")
except ValueError:
    logging.getLogger("some").exception("trouble with %d images", 2)
"""


@pytest.mark.parametrize(
    ("log_format", "terminal", "is_json"),
    [
        ("auto", False, True),
        ("auto", True, False),
        ("json", True, True),
        ("text", False, False),
    ],
)
def test_logs_are_json_unless_somebody_reads_them_on_a_terminal(log_format, terminal, is_json):
    reading, writing = pty.openpty() if terminal else os.pipe()
    subprocess.run([sys.executable, "-c", WRITE, log_format], stderr=writing, check=True, timeout=60)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        written = b""
        try:
            while chunk := stream.read1():
                written += chunk
        except OSError:  # how a terminal without a writer ends
            pass

    text = written.decode()
    assert "trouble with 2 images" in text and "it failed" in text
    assert text.startswith("{") == is_json
    if is_json:
        line = json.loads(text)
        assert (line["level"], line["logger"]) == ("error", "some") and "ValueError" in line["exception"]
    assert "hunter2" not in text and "pixels" not in text  # a traceback shows no variable's value


def test_no_key_and_no_image_is_in_the_log(start_igd, tiny_model, redis, until):
    redis.start("--requirepass", "redis-secret")
    secrets = {"admin-secret", "api-secret", "guessed-secret", "redis-secret", "query-secret", "cookie-secret"}
    server = start_igd.serve(
        tiny_model,
        IGD_ACCESS_LOG="true",
        IGD_LOG_LEVEL="debug",
        IGD_ADMIN_KEY="admin-secret",
        IGD_API_KEYS="api-secret",
        IGD_REDIS_URL=redis.url.replace("://", "://:redis-secret@"),
    )
    images = [png(seed) for seed in range(3)] + [b"GIF89a no image", png(4)[:-30]]
    with server.client() as client:
        for key in ("api-secret", "guessed-secret"):
            headers = PNG | {"Authorization": f"Bearer {key}", "Cookie": "session=cookie-secret"}
            for image in images:
                encoded = base64.b64encode(image).decode()
                tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [encoded]}
                client.post("/classify?key=query-secret", content=image, headers=headers)
                client.post(
                    "/classify", json={"images": [encoded, "?"]}, headers=headers | {"Content-Type": "application/json"}
                )
                client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}, headers=headers)
                client.post("/classify", content=image, headers=headers | {"Content-Type": "application/x-npy"})
        client.post("/rank-neurons", json={}, headers={"Authorization": "Bearer admin-secret"})
        redis.kill()
        client.post("/rank-neurons", json={}, headers={"Authorization": "Bearer admin-secret"})
        until(lambda: len(requests(server)) == 42, "the lines")
        server.signal(signal.SIGTERM)
    assert server.ended() == 0

    written = server.output
    assert not [secret for secret in secrets if secret in written]
    for image in images:
        for form in (base64.b64encode(image).decode(), repr(image)[2:-1], image.hex()):
            assert not [i for i in range(0, len(form) - 24, 8) if form[i : i + 24] in written]
    assert "Traceback" not in written


def test_a_job_s_log_names_the_request_and_trace_that_asked_for_it(start_igd, tiny_model, tmp_path, until):
    store = ("--data-dir", tmp_path / "store")
    server = start_igd.serve(tiny_model, *store, IGD_ADMIN_KEY="sesame")
    admin = TRACEPARENT | {"Authorization": "Bearer sesame", "X-Request-ID": "mine"}
    with server.client() as client:
        worker = start_igd("worker", "--model", tiny_model, *store)
        job = client.post("/rank-neurons", json={"method": "lo-ir"}, headers=admin).json()
        path = f"/rank-neurons/{job['id']}"
        until(lambda: client.get(path, headers=admin).json()["state"] == "succeeded", "the job")
        shown = client.get(path, headers=admin).json()["log"]

    assert TRACE in shown[0] and "mine" in shown[0]
    of_the_job = [line for line in lines(worker) if line.get("job_id") == job["id"]]
    assert of_the_job and all((line["trace_id"], line["request_id"]) == (TRACE, "mine") for line in of_the_job)
    assert len(lines(worker)) == len(worker.output.splitlines())  # RQ's own, too


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"cc-{TRACE}-b7ad6b7169203331-00-what-will-be", TRACE),
        (f"00-{TRACE}-b7ad6b7169203331-01-more", None),
        (f"ff-{TRACE}-b7ad6b7169203331-01", None),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-b7ad6b7169203331-01\n", None),
        ("", None),
    ],
)
def test_a_trace_is_taken_from_a_valid_header_only(header, trace_id):
    assert trace_id_of(header.encode()) == trace_id


class Collector(ThreadingHTTPServer):
    """Receives spans as OTLP over HTTP, on a free port."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Receive)
        self.spans, self.services = [], set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Receive(BaseHTTPRequestHandler):
    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.server.services.add(named["service.name"])
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def collector():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'ig-defense[otel]'")
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield collector
        collector.shutdown()


def test_spans_of_requests_reach_a_collector(start_igd, tiny_model, collector, until):
    server = start_igd.serve(tiny_model, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    with server.client() as client:
        assert client.post("/classify", content=png(), headers=PNG | TRACEPARENT).status_code == 200
        assert client.post("/classify", content=b"no image", headers=PNG).status_code == 400
    server.signal(signal.SIGTERM)  # sends what is left
    assert server.ended() == 0

    assert collector.services == {"ig-defense"}
    by_trace = {}
    for span in collector.spans:
        by_trace.setdefault(span.trace_id.hex(), {})[span.name] = span
    traced = by_trace.pop(TRACE)
    assert set(traced) == {"POST /classify", "queue", "trunk", "tail"}
    root = traced.pop("POST /classify")
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    for span in traced.values():
        assert span.parent_span_id == root.span_id
        assert root.start_time_unix_nano < span.start_time_unix_nano < span.end_time_unix_nano < root.end_time_unix_nano
    assert traced["queue"].end_time_unix_nano <= traced["trunk"].start_time_unix_nano
    assert traced["trunk"].end_time_unix_nano <= traced["tail"].start_time_unix_nano
    ((name, refused),) = next(iter(by_trace.values())).items()  # in a trace of its own, without stages
    assert name == "POST /classify" and not refused.parent_span_id
    status = {attribute.key: attribute.value.int_value for attribute in refused.attributes}["http.response.status_code"]
    assert status == 400


def test_a_collector_that_is_away_stops_no_request_and_no_end(start_igd, tiny_model):
    server = start_igd.serve(tiny_model, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    with server.client() as client:
        assert client.post("/classify", content=png(), headers=PNG).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.ended() == 0
