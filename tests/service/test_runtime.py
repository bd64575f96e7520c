"""What the runtime does when something unforeseen fails, without a server."""

import asyncio
import os
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect

from defense import DefenseError
from importance_store import StoreUnavailable
from service import runtime as runtime_module
from service.batching import Batcher
from service.compilers import EngineError
from service.errors import DeadlineExceeded, Draining, NotFound, QueueFull
from service.metrics import Metrics
from service.routes import admission, inference_protocol
from service.routes.inference_protocol import check_version
from service.routes.status import check_ready
from service.runtime import Runtime
from service.settings import Settings


def test_a_store_that_cannot_be_opened_later_for_an_unknown_reason_ends_the_server(monkeypatch, tiny_model, tmp_path):
    signals, outcomes = [], iter([StoreUnavailable("gone"), RuntimeError("no memory for the engine")])
    runtime = Runtime(Settings(model=tiny_model, data_dir=tmp_path), Metrics())

    def open_store():
        raise next(outcomes)

    monkeypatch.setattr(runtime_module, "REOPEN_S", 0)
    monkeypatch.setattr(runtime, "_open_store", open_store)
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    asyncio.run(runtime._keep_opening_store())

    assert str(runtime.fatal) == "no memory for the engine"
    assert signals == [(os.getpid(), signal.SIGTERM)]


def test_only_the_request_s_own_deadline_is_told_as_one(monkeypatch):
    runtime = SimpleNamespace(
        defense=None, settings=SimpleNamespace(deadline_s=30), batcher=SimpleNamespace(check_room=lambda: None)
    )
    monkeypatch.setattr(admission, "runtime_of", lambda request: runtime)

    async def failing_read():
        raise TimeoutError("of the device")

    request = SimpleNamespace(state=SimpleNamespace(arrived_at=time.perf_counter()))
    with pytest.raises(TimeoutError, match="of the device"):
        asyncio.run(admission.classified(request, failing_read))


def request_of(deadline_s, classify, monkeypatch):
    """A request, whose client has left, to a runtime that has room for it."""
    batcher = SimpleNamespace(check_room=lambda: None)
    settings = SimpleNamespace(deadline_s=deadline_s)
    runtime = SimpleNamespace(defense=None, settings=settings, batcher=batcher, classify=classify)
    monkeypatch.setattr(admission, "runtime_of", lambda request: runtime)

    async def receive():
        return {"type": "http.disconnect"}

    return SimpleNamespace(state=SimpleNamespace(arrived_at=time.perf_counter()), receive=receive)


def test_what_a_client_that_left_waits_for_is_given_up(monkeypatch):
    ended = []

    async def classify(defense, images):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("classify")

    async def read():
        return []

    with pytest.raises(ClientDisconnect):
        asyncio.run(admission.classified(request_of(30, classify, monkeypatch), read))
    assert ended == ["classify"]


def test_the_deadline_counts_the_time_of_an_upload(monkeypatch):
    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
        asyncio.run(admission.classified(request_of(0.05, None, monkeypatch), lambda: asyncio.sleep(60)))


def test_nothing_is_decoded_of_what_is_not_admitted(monkeypatch, tiny_model, tmp_path):
    runtime, decoded = Runtime(Settings(model=tiny_model, data_dir=tmp_path), Metrics()), []
    runtime.batcher = Batcher(None, None, max_batch_size=1, max_queue=2)
    runtime._decoder = SimpleNamespace(decode=decoded.append)

    async def scenario():
        runtime.batcher.start()
        runtime.batcher.in_flight = 1
        with pytest.raises(QueueFull):
            await runtime.classify(None, [b"one", b"two"])
        assert runtime.batcher.in_flight == 1

    asyncio.run(scenario())
    assert not decoded


def test_settings_reach_what_they_are_for(monkeypatch, tiny_model, tmp_path):
    settings = Settings(
        model=tiny_model, data_dir=tmp_path, max_wait_ms=1.5, decode_threads=3, max_batch_size=7, max_queue=9
    )
    runtime, given = Runtime(settings, Metrics()), {}

    class Stop(Exception):
        """Far enough."""

    def batcher(*positional, **named):
        given.update(named)
        raise Stop

    monkeypatch.setattr(runtime_module, "Batcher", batcher)
    monkeypatch.setattr(runtime_module, "Decoder", lambda *positional, **named: given.update(named))
    with suppress(Stop):
        asyncio.run(runtime.start())
    found = {name: given[name] for name in ("max_wait_s", "threads", "max_batch_size", "max_queue")}
    assert found == {"max_wait_s": 0.0015, "threads": 3, "max_batch_size": 7, "max_queue": 9}


@pytest.mark.parametrize(("leaving", "accepting"), [(True, True), (False, False)])
def test_a_server_that_leaves_or_whose_dispatcher_is_dead_is_not_ready(leaving, accepting):
    batcher = SimpleNamespace(accepting=accepting)
    with pytest.raises(Draining):
        check_ready(SimpleNamespace(leaving=leaving, batcher=batcher, defense="of now"))
    batcher.accepting = True
    assert check_ready(SimpleNamespace(leaving=False, batcher=batcher, defense="of now")) == "of now"


def test_an_inference_is_of_the_version_that_was_asked_for(monkeypatch):
    served, config = SimpleNamespace(version="v1"), SimpleNamespace(name="m")
    settings, predictor = SimpleNamespace(api_keys=()), SimpleNamespace(config=config)
    runtime = SimpleNamespace(defense=served, served=served, settings=settings, predictor=predictor)

    async def classified(request, read):  # while another version is activated
        return SimpleNamespace(version="v2"), None

    monkeypatch.setattr(inference_protocol, "runtime_of", lambda request: runtime)
    monkeypatch.setattr(inference_protocol, "classified", classified)
    with pytest.raises(NotFound, match="'v1' is not being served, 'v2' is"):
        asyncio.run(inference_protocol.infer(SimpleNamespace(headers={}), "m", "v1"))


@pytest.mark.parametrize(("error", "advised"), [(EngineError("no such precision"), 0), (DefenseError("no fit"), 1)])
def test_to_rank_again_is_advised_where_it_helps(error, advised, monkeypatch, tiny_model, tmp_path, caplog):
    runtime = Runtime(Settings(model=tiny_model, data_dir=tmp_path), Metrics())
    loaded = SimpleNamespace(version="v1", importance=None)

    def prepare(version, importance):
        raise error

    runtime.predictor = SimpleNamespace(model_digest="d", prepare=prepare)
    runtime._activate(SimpleNamespace(load=lambda version, model_digest: loaded), "v1")
    assert f"version v1 is not served: {error}" in caplog.text and runtime.problem == str(error)
    assert caplog.text.count("igd rank") == advised


def test_a_version_that_is_asked_for_is_that_or_none():
    for served, version in ((None, "v1"), (SimpleNamespace(version="v2"), "v1")):
        with pytest.raises(NotFound, match="'v1' is not being served"):
            check_version(served, version)
    check_version(SimpleNamespace(version="v1"), "v1")
    check_version(None, None)
