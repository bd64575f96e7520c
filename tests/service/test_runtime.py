"""What the runtime does when something unforeseen fails, without a server."""

import asyncio
import os
import signal
import time
from types import SimpleNamespace

import pytest

from importance_store import StoreUnavailable
from service import runtime as runtime_module
from service.metrics import Metrics
from service.routes import admission
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
