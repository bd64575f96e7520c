"""The short way of small classifications: no task, and nobody who sends one notices anything of it."""

import asyncio
import gc
import io
import logging
import threading
import time
import weakref
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
import uvloop
from PIL import Image
from pydantic import SecretStr
from uvicorn.server import ServerState

from defense.model_config import InputConfig
from service.answers import Answer, BatchRun
from service.batching import Batcher
from service.connection import HOLD_S, Connection
from service.decoding import Decoder
from service.device import Device
from service.direct import DirectRequest
from service.logs import log_context
from service.metrics import Metrics
from service.middleware import BodyLimit, RequestContext
from service.runtime import Runtime

INPUT = InputConfig(size=(8, 8), channels=3)
BIG, NO_PNG = bytes(100_000), b"\x89PNG\r\n\x1a\n nothing like it"


def png(seed=0, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=9)
    return file.getvalue()


def flat_png(width, height):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def npy(count):
    file = io.BytesIO()
    np.save(file, np.zeros((count, 8, 8, 3), np.uint8))
    return file.getvalue()


def head(length, *headers, target="/classify", media_type="image/png", version="1.1"):
    """The head of a request for a classification."""
    lines = [f"POST {target} HTTP/{version}", "Host: x", f"Content-Type: {media_type}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def request_of(body, *headers, **options):
    return head(len(body), *headers, **options) + body


class Service:
    """What ``Connection`` needs of a server, with a device that can be held up; the application answers 418."""

    def __init__(self, *, max_queue=100, deadline_s=20.0, run_batch=None):
        self.metrics, self.limit = Metrics(), BodyLimit(10**6, 10**7)
        self.context = RequestContext(self.application, self.metrics, self.limit)
        self.settings = SimpleNamespace(api_keys=[SecretStr("sesame")], deadline_s=deadline_s)
        self.predictor = SimpleNamespace(config=SimpleNamespace(name="m", labels=["dark", "light"], input=INPUT))
        self.defense = SimpleNamespace(version="v1")
        self._decoder = Decoder(INPUT, threads=1, max_pixels=10**6)
        self.device, self.seen = Device(), []
        self.may_go_on, self.at_work = threading.Event(), threading.Event()
        self.may_go_on.set()
        run = run_batch or self.run_batch
        self.batcher = Batcher(run, self.device, max_batch_size=8, max_queue=max_queue)
        self.asked, self.state = [], ServerState()

    enqueue = Runtime.enqueue

    def run_batch(self, defense, images):
        self.at_work.set()
        assert self.may_go_on.wait(20)
        self.seen.extend(int(image.mean()) for image in images)
        return [answer(image) for image in images]

    async def application(self, scope, receive, send):
        """uvicorn's way; it notes what it was asked, and under which id it would log."""
        self.asked.append(scope["path"])
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 418, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def counted(self, outcome):
        value = self.metrics.registry.get_sample_value(
            "igd_requests_total", {"endpoint": "classify", "outcome": outcome}
        )
        return int(value)

    @property
    def is_empty(self):
        return self.batcher.in_flight == self.limit.held_bytes == 0


def answer(image):
    """Light or dark, by the mean of the pixels."""
    light = float(image.mean() / 255)
    row = np.array([1 - light, light], np.float32)
    return Answer(np.stack([row] * 5), BatchRun(1, 0.0, 0.0, {"trunk": 0.0, "tail": 0.0}))


KEY = "Authorization: Bearer sesame"


@asynccontextmanager
async def serving(**options):
    """A ``Service``, and a function that opens connections to it."""
    service = Service(**options)
    service.batcher.start()
    config = uvicorn.Config(service.context, http="httptools", log_config=None, access_log=False)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(service.context, service, config=config, server_state=service.state, app_state={}),
        "127.0.0.1",
    )
    opened = []

    async def connect():
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        opened.append(writer)
        return reader, writer

    try:
        yield service, connect
    finally:
        service.may_go_on.set()
        for writer in opened:
            writer.close()
        await service.batcher.drain(10)
        server.close()
        service.device.shutdown()
        service.metrics.thread.shutdown()


async def read_answer(reader):
    """Status, headers and body of the next answer."""
    lines = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode().split("\r\n")
    headers = httpx.Headers([line.split(": ", 1) for line in lines[1:-2]])
    return int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true within 20 s")


def run(scenario):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    ("body", "media_type"),
    [(png(), "image/png"), (bytes(8 * 8 * 3), "application/octet-stream"), (npy(1), "application/x-npy")],
)
def test_one_small_image_is_classified_without_the_application_and_without_a_task(body, media_type, pieces):
    async def scenario():
        async with serving() as (service, connect):
            service.may_go_on.clear()
            reader, writer = await connect()
            sent = request_of(body, KEY, media_type=media_type)
            for piece in [sent] if pieces == 1 else [sent[: -len(body)], body]:
                writer.write(piece)
                await asyncio.sleep(0)
            await asyncio.to_thread(service.at_work.wait, 20)
            assert service.batcher.in_flight == 1 and not service.state.tasks
            service.may_go_on.set()
            status, headers, text = await read_answer(reader)
            assert (status, headers["content-type"]) == (200, "application/json") and b'"light"' in text
            assert not service.asked and service.is_empty and service.counted("ok") == 1

    run(scenario)


OTHERS = {
    "an unknown file": request_of(b"x" * 100, KEY),
    "another path": request_of(png(), KEY, target="/elsewhere"),
    "another method": request_of(png(), KEY).replace(b"POST", b"PUT", 1),
    "a large file": request_of(png() + bytes(5000), KEY),
    "many pixels in a small file": request_of(flat_png(300, 300), KEY),
    "several images": request_of(npy(2), KEY, media_type="application/x-npy"),
    "JSON": request_of(b"{}", KEY, media_type="application/json"),
    "a form": request_of(b"", KEY, media_type="multipart/form-data; boundary=x"),
    "nothing known": request_of(b"x", KEY, media_type="text/plain"),
    "a large array": request_of(BIG, KEY, media_type="application/octet-stream"),
    "a body of chunks": head(0, KEY, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    + b"1\r\nx\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_goes_to_the_application(name):
    async def scenario():
        async with serving() as (service, connect):
            reader, writer = await connect()
            writer.write(OTHERS[name])
            assert (await read_answer(reader))[0] == 418
            await until(lambda: not service.state.tasks)
            assert len(service.asked) == 1 and service.is_empty and not service.seen

    run(scenario)


def test_a_body_that_is_late_goes_to_the_application():
    async def scenario():
        async with serving() as (service, connect):
            reader, writer = await connect()
            writer.write(head(len(png()), KEY))
            await until(lambda: service.asked)
            writer.write(png())
            assert (await read_answer(reader))[0] == 418
            writer.write(request_of(png(), KEY))  # and the next one takes the short way again
            assert (await read_answer(reader))[0] == 200

    run(scenario)


REFUSED = {
    "no key": (request_of(png()), 401, "client_error"),
    "no image": (request_of(NO_PNG, KEY), 400, "client_error"),
    "a damaged image": (request_of(png()[:-40], KEY), 400, "client_error"),
    "a senseless top": (request_of(png(), KEY, target="/classify?top=0"), 422, "client_error"),
    "pixels of another size": (request_of(bytes(9), KEY, media_type="application/octet-stream"), 422, "client_error"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_classified_is_refused_at_once(name):
    sent, expected, outcome = REFUSED[name]

    async def scenario():
        async with serving() as (service, connect):
            reader, writer = await connect()
            writer.write(sent)
            status, headers, text = await read_answer(reader)
            assert (status, headers["content-type"]) == (expected, "application/problem+json")
            assert headers["x-request-id"].encode() in text
            assert not service.asked and not service.seen and service.is_empty and service.counted(outcome) == 1
            writer.write(request_of(png(), KEY))  # the connection is as good as before
            assert (await read_answer(reader))[0] == 200

    run(scenario)


def test_under_overload_requests_are_refused_and_told_when_to_come_back():
    async def scenario():
        async with serving(max_queue=1) as (service, connect):
            service.may_go_on.clear()
            (first, writer), (second, other) = await connect(), await connect()
            writer.write(request_of(png(), KEY))
            await asyncio.to_thread(service.at_work.wait, 20)
            other.write(request_of(b"not even looked at", KEY))
            status, headers, _ = await read_answer(second)
            assert status == 429 and int(headers["retry-after"]) >= 1
            service.may_go_on.set()
            assert (await read_answer(first))[0] == 200
            assert service.counted("rejected") == 1 and service.is_empty

    run(scenario)


def test_the_deadline_ends_the_wait_and_the_device_never_sees_the_image():
    async def scenario():
        async with serving(deadline_s=0.2) as (service, connect):
            service.may_go_on.clear()
            readers = []
            for body in (bytes(192), bytes([9]) * 192):
                reader, writer = await connect()
                writer.write(request_of(body, KEY, media_type="application/octet-stream"))
                readers.append(reader)
                await asyncio.to_thread(service.at_work.wait, 20)
            for reader in readers:
                status, _, text = await read_answer(reader)
                assert status == 504 and b"IGD_DEADLINE_S" in text
            assert service.is_empty and service.counted("error") == 2
            service.may_go_on.set()
            await until(lambda: service.batcher.depth == 0 and service.seen)
            assert service.seen == [0]  # the first was there when time ran out

    run(scenario)


def test_a_deadline_that_is_over_before_the_image_is_decoded_ends_it_as_well():
    async def scenario():
        async with serving(deadline_s=1e-9) as (service, connect):
            reader, writer = await connect()
            writer.write(request_of(png(), KEY))
            assert (await read_answer(reader))[0] == 504
            await until(lambda: service.batcher.depth == 0)
            assert not service.seen and service.is_empty

    run(scenario)


def test_the_device_never_sees_the_image_of_a_client_that_left():
    async def scenario():
        async with serving() as (service, connect):
            service.may_go_on.clear()
            reader, writer = await connect()
            writer.write(request_of(bytes(192), KEY, media_type="application/octet-stream"))
            await asyncio.to_thread(service.at_work.wait, 20)
            _, leaving = await connect()
            leaving.write(request_of(bytes([9]) * 192, KEY, media_type="application/octet-stream"))
            await until(lambda: service.batcher.in_flight == 2)
            leaving.close()
            await until(lambda: service.batcher.in_flight == 1)
            service.may_go_on.set()
            assert (await read_answer(reader))[0] == 200
            await until(lambda: service.batcher.depth == 0)
            assert service.seen == [0] and service.is_empty
            assert service.counted("client_error") == service.counted("ok") == 1  # 499 and 200

    run(scenario)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_counted():
    async def scenario():
        async with serving() as (service, connect):
            _, writer = await connect()
            writer.write(head(1000, KEY) + b"only this")
            await asyncio.sleep(0)
            writer.close()
            await until(lambda: service.asked)
            await until(lambda: not service.state.tasks)
            assert service.is_empty and not service.seen

    run(scenario)


def test_one_that_waits_behind_one_on_its_short_way_is_answered_after_it():
    async def scenario():
        async with serving() as (service, connect):
            service.may_go_on.clear()
            reader, writer = await connect()
            writer.write(request_of(png(), KEY) * 2)
            await asyncio.to_thread(service.at_work.wait, 20)
            await asyncio.sleep(0.05)
            assert not service.asked
            service.may_go_on.set()
            assert [(await read_answer(reader))[0] for _ in range(2)] == [200, 418]

    run(scenario)


def test_nothing_is_begun_behind_an_answer_that_was_the_connection_s_last():
    async def scenario():
        async with serving() as (service, connect):
            service.limit.max_body_bytes = 1000
            reader, writer = await connect()
            writer.write(request_of(bytes(2000), KEY) + request_of(b"{}", KEY, media_type="application/json"))
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (413, "close") and await reader.read() == b""
            assert not service.asked and service.is_empty

    run(scenario)


def test_a_body_that_came_while_the_loop_was_busy_is_not_late():
    async def scenario():
        async with serving() as (service, connect):
            (slow, slow_writer), (other, other_writer) = await connect(), await connect()
            client, enqueue = slow_writer.get_extra_info("socket").dup(), service.enqueue

            def busy_enqueue(*given):  # in the phase of the loop in which it reads, before that of its timers
                service.enqueue = enqueue
                client.send(png())
                time.sleep(4 * HOLD_S)
                return enqueue(*given)

            client.send(head(len(png()), KEY))
            while not any(connection._give_up for connection in service.state.connections):  # noqa: ASYNC110 - for 5 ms
                await asyncio.sleep(0)
            service.enqueue = busy_enqueue
            other_writer.write(request_of(png(), KEY))
            assert [(await read_answer(reader))[0] for reader in (other, slow)] == [200, 200]
            client.close()

    run(scenario)


def test_a_connection_that_was_closed_needs_no_collector():
    async def scenario():
        async with serving() as (service, connect):
            for leaves in (False, True):
                reader, writer = await connect()
                writer.write(request_of(png(), KEY))
                assert (await read_answer(reader))[0] == 200
                connection = weakref.ref(next(iter(service.state.connections)))
                assert not connection().cycle.body
                if leaves:
                    service.may_go_on.clear()
                    writer.write(request_of(png(), KEY))
                    await until(lambda: service.batcher.in_flight)
                writer.close()
                await until(lambda: not service.state.connections)
                service.may_go_on.set()
                await until(lambda: service.batcher.depth == 0)
                await asyncio.sleep(0.05)
                assert connection() is None

    gc.collect()
    gc.disable()
    try:
        run(scenario)
    finally:
        gc.enable()


def test_a_client_that_left_is_logged_under_its_request_s_id(monkeypatch):
    logged = []

    async def scenario():
        async with serving() as (service, connect):
            monkeypatch.setattr(service.context.log, "end", lambda *given: logged.append((given[1], log_context.get())))
            service.may_go_on.clear()
            _, writer = await connect()
            writer.write(request_of(png(), KEY, "X-Request-ID: mine"))
            await until(lambda: service.batcher.in_flight)
            writer.close()
            await until(lambda: logged)

    run(scenario)
    assert logged == [(499, {"request_id": "mine"})]


def test_an_error_that_nobody_waits_for_any_more_is_no_news(caplog):
    async def scenario():
        async with serving() as (service, _):
            future, answers = asyncio.get_running_loop().create_future(), []
            service.enqueue = lambda defense, image, future=future: future
            headers = [(b"content-type", b"image/png"), (b"authorization", b"Bearer sesame")]
            scope = {"path": "/classify", "method": "POST", "query_string": b"", "headers": headers}
            request = DirectRequest(service.context, service, scope, answers.append)
            assert request.begin(png())
            future.set_exception(ValueError("the batch failed"))
            request.leave()
            await asyncio.sleep(0)
            del request, future, service.enqueue
            gc.collect()
            assert not answers and service.is_empty

    run(scenario)
    assert not caplog.records


def test_an_answer_that_cannot_be_sent_closes_the_connection(monkeypatch):
    async def scenario():
        async with serving() as (service, connect):
            monkeypatch.setattr(Connection, "_write", lambda *given: 1 / 0)
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))
            reader, writer = await connect()
            writer.write(request_of(png(), KEY))
            assert await asyncio.wait_for(reader.read(), 20) == b"" and service.is_empty

    errors = []
    run(scenario)
    assert [type(error) for error in errors] == [ZeroDivisionError]


def test_requests_sent_ahead_are_answered_in_their_order():
    async def scenario():
        async with serving() as (service, connect):
            reader, writer = await connect()
            ids = [f"X-Request-ID: {i}" for i in range(6)]
            bad = request_of(NO_PNG, KEY, "X-Request-ID: bad")
            writer.write(bad + b"".join(request_of(png(), KEY, request_id) for request_id in ids))
            answers = [await read_answer(reader) for _ in range(7)]
            assert [headers["x-request-id"] for _, headers, _ in answers] == ["bad", *"012345"]
            # One takes the short way in a turn of the loop: many would keep other clients waiting.
            assert [status for status, _, _ in answers] == [400, *[418] * 6] and service.is_empty

    run(scenario)


def test_answers_do_not_pile_up_for_a_client_that_does_not_read_them():
    async def scenario():
        async with serving() as (service, connect):
            reader, writer = await connect()
            await until(lambda: service.state.connections)
            (connection,) = service.state.connections
            connection.pause_writing()  # as the transport does when its buffer is full
            writer.write(request_of(png(), KEY))
            await until(lambda: service.asked)  # the application's way, which waits
            await asyncio.sleep(0.05)
            assert not connection.cycle.response_started
            connection.resume_writing()
            assert (await read_answer(reader))[0] == 418

    run(scenario)


@pytest.mark.parametrize(("version", "header"), [("1.1", "Connection: close"), ("1.0", "X-Nothing: here")])
def test_the_connection_is_closed_when_the_client_wants_it(version, header):
    async def scenario():
        async with serving() as (_, connect):
            reader, writer = await connect()
            writer.write(request_of(png(), KEY, header, version=version))
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (200, "close") and await reader.read() == b""

    run(scenario)


def test_at_shutdown_the_answer_is_the_connection_s_last():
    async def scenario():
        async with serving() as (service, connect):
            service.may_go_on.clear()
            reader, writer = await connect()
            writer.write(request_of(png(), KEY))
            await asyncio.to_thread(service.at_work.wait, 20)
            for connection in list(service.state.connections):
                connection.shutdown()
            service.may_go_on.set()
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (200, "close") and await reader.read() == b""
            assert service.state.total_requests == 1

    run(scenario)


@pytest.mark.parametrize("sent", [b"", b"P", head(10)[:-2]])
def test_a_head_that_does_not_come_ends_the_connection(sent, monkeypatch):
    monkeypatch.setattr("service.connection.HEAD_S", 0.1)

    async def scenario():
        async with serving() as (service, connect):
            reader, writer = await connect()
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert not service.asked

    run(scenario)


def test_a_head_that_comes_slowly_is_read_and_the_body_has_its_own_time(monkeypatch):
    monkeypatch.setattr("service.connection.HEAD_S", 1.0)

    async def scenario():
        async with serving() as (service, connect):
            reader, writer = await connect()
            request = request_of(png(), KEY)
            for i in range(0, 60, 20):
                writer.write(request[i : i + 20])
                await asyncio.sleep(0.05)
            writer.write(request[60:-1])
            await asyncio.sleep(1.5)
            writer.write(request[-1:])
            assert (await read_answer(reader))[0] == 418 and service.asked

    run(scenario)


def test_a_large_body_in_one_piece_with_its_head_is_none_of_the_head():
    async def scenario():
        async with serving() as (_, connect):
            reader, writer = await connect()
            writer.write(request_of(bytes(150_000), KEY, media_type="application/octet-stream") * 2)
            for _ in range(2):
                assert (await read_answer(reader))[0] == 418

    run(scenario)


def test_a_head_that_begins_behind_a_large_body_is_none_too_large():
    async def scenario():
        async with serving() as (service, connect):
            reader, _ = await connect()
            await until(lambda: service.state.connections)
            (connection,) = service.state.connections
            request = request_of(bytes(100_000), KEY, media_type="application/octet-stream")
            for piece in (request[:50], request[50:] + request[:20], request[20:]):
                connection.data_received(piece)
            for _ in range(2):
                assert (await read_answer(reader))[0] == 418

    run(scenario)


@pytest.mark.parametrize("cuts", [[], [40_000], [100_000], [70_000, 150_000]], ids=str)
def test_a_head_of_many_headers_is_too_large_however_it_comes(cuts):
    async def scenario():
        async with serving() as (service, connect):
            reader, _ = await connect()
            await until(lambda: service.state.connections)
            (connection,) = service.state.connections
            request = request_of(png(), KEY, *["X-A: b"] * 20_000)  # 8 bytes each
            for begin, end in zip([0, *cuts], [*cuts, len(request)], strict=True):
                connection.data_received(request[begin:end])
            assert (await read_answer(reader))[0] == 431

    run(scenario)


def test_a_bug_is_logged_under_the_request_s_id_and_answered_with_500(caplog):
    def fail(defense, images):
        raise ZeroDivisionError

    seen = []

    class Seeing(logging.Handler):
        def emit(self, record):
            seen.append((record.getMessage(), dict(log_context.get())))

    async def scenario():
        async with serving(run_batch=fail) as (service, connect):
            reader, writer = await connect()
            writer.write(request_of(png(), KEY, "X-Request-ID: mine"))
            status, _, text = await read_answer(reader)
            assert status == 500 and b"mine" in text and service.is_empty
            writer.write(b"nonsense\r\n\r\n")  # uvicorn's warning is of the connection, not of the request before
            assert b"400" in await reader.readline()

    handler = Seeing()
    logging.getLogger().addHandler(handler)
    try:
        run(scenario)
    finally:
        logging.getLogger().removeHandler(handler)
    assert ("request mine failed", {"request_id": "mine"}) in seen
    assert ("Invalid HTTP request received.", {}) in seen


def test_a_bug_where_none_is_expected_closes_the_connection_and_is_logged(monkeypatch, caplog):
    async def scenario():
        async with serving() as (service, connect):
            monkeypatch.setattr(service.context, "begin", lambda scope: 1 / 0)
            reader, writer = await connect()
            writer.write(request_of(png(), KEY))
            assert await asyncio.wait_for(reader.read(), 20) == b""

    run(scenario)
    assert "ZeroDivisionError" in caplog.text
