"""How a server ends of which something hangs or is broken: in time, and nobody goes without an answer."""

import signal
import threading
import time

import httpx
import pytest

DRAIN_S = 3

HANGS = """
import threading
from service.predictor import Predictor
def both_passes(*given):
    print("the device hangs", flush=True)
    threading.Event().wait()
Predictor.both_passes = both_passes
"""
DISPATCHER_DIES = """
from service.batching import Batcher
def _settle(self, *given):
    self._die(KeyError("a bug"))
Batcher._settle = _settle
"""
NO_DEVICE = """
from service.runtime import Runtime
start = Runtime.start
async def start_and_lose_the_device(self):
    await start(self)
    self.batcher._device.shutdown()
Runtime.start = start_and_lose_the_device
"""


@pytest.fixture
def image(tiny_model):
    return next((tiny_model / "samples").iterdir()).read_bytes()


class Request(threading.Thread):
    """A classification, sent from a thread of its own."""

    def __init__(self, server, image):
        super().__init__()
        self._url, self._image = server.url, image
        self.answer = None
        self.start()

    def run(self):
        headers = {"Content-Type": "image/png"}
        self.answer = httpx.post(f"{self._url}/classify", content=self._image, headers=headers, timeout=30)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_device_that_hangs_does_not_keep_the_server(signals, start_igd, tiny_model, image, until):
    server = start_igd.serve(tiny_model, "--drain-s", DRAIN_S, before=HANGS)
    request = Request(server, image)
    until(lambda: "the device hangs" in server.output, "a device that hangs")

    told_at = time.monotonic()
    for _ in range(signals):
        server.signal(signal.SIGTERM)
        time.sleep(0.3)
    assert server.ended() == 0
    took_s = time.monotonic() - told_at

    request.join()
    assert request.answer.status_code == 503 and "shutting down" in request.answer.json()["detail"]
    print(f"\nended {took_s:.1f} s after {signals} signals; {DRAIN_S} s are allowed")  # no bound: machines are busy
    assert "ending without waiting" in server.output


def test_what_comes_after_the_signal_is_refused(start_igd, tiny_model, image, until):
    server = start_igd.serve(tiny_model, "--drain-s", 8, before=HANGS)
    request = Request(server, image)
    until(lambda: "the device hangs" in server.output, "a device that hangs")

    server.signal(signal.SIGTERM)
    with server.client() as client:
        until(lambda: client.get("/health/ready").status_code == 503, "a server that is not ready")
        answer = client.post("/classify", content=image, headers={"Content-Type": "image/png"})
    assert answer.status_code == 503 and "shutting down" in answer.json()["detail"]
    assert request.answer is None  # which was admitted, and has its time
    assert server.ended() == 0
    request.join()


@pytest.mark.parametrize("broken", [DISPATCHER_DIES, NO_DEVICE])
def test_a_dispatcher_that_dies_ends_the_server(broken, start_igd, tiny_model, image):
    server = start_igd.serve(tiny_model, before=broken)

    request = Request(server, image)

    assert server.ended() == 1
    request.join()
    assert request.answer.status_code == 503 and "dispatcher died" in request.answer.json()["detail"]
    assert "the batch dispatcher died" in server.output
