"""When a batch is run on the event loop's own thread: a lone, quick item, with nothing else in progress."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager

import pytest

from service import batching
from service.batching import Batcher
from service.device import Device


class Recorder:
    """A run_batch that notes each batch and whether it ran on the event loop's thread."""

    def __init__(self, takes_s=0.0):
        self.batches, self.takes_s = [], takes_s
        self._loop_thread = threading.current_thread()

    def __call__(self, group, items):
        self.batches.append((items, threading.current_thread() is self._loop_thread))
        time.sleep(self.takes_s)
        if "poison" in items:
            raise ValueError("cannot run this")
        return items


@asynccontextmanager
async def running(run_batch, **options):
    device = Device()
    batcher = Batcher(run_batch, device, max_batch_size=8, max_queue=100, in_place=lambda group: True, **options)
    batcher.start()
    try:
        yield batcher, device
    finally:
        await batcher.drain(10)
        device.shutdown()


async def classify(batcher, *items):
    with batcher.admit(len(items)):
        return await batcher.submit("a", items)


def test_a_lone_item_is_run_here_once_it_is_known_to_be_quick(monkeypatch):
    monkeypatch.setattr(batching, "IN_PLACE_S", 60)  # however busy this machine is

    async def scenario():
        recorder = Recorder()
        async with running(recorder) as (batcher, _):
            answers = [await classify(batcher, i) for i in range(3)]
        assert answers == [[0], [1], [2]]
        assert recorder.batches == [([0], False), ([1], True), ([2], True)]

    asyncio.run(scenario())


def test_items_that_come_together_go_to_the_device_thread_as_one_batch():
    async def scenario():
        recorder = Recorder()
        async with running(recorder) as (batcher, _):
            await classify(batcher, "first")
            await asyncio.gather(*(classify(batcher, i) for i in range(4)))
        assert recorder.batches[1:] == [([0, 1, 2, 3], False)]

    asyncio.run(scenario())


def test_an_item_is_not_run_here_while_another_request_is_in_progress():
    async def scenario():
        recorder = Recorder()
        async with running(recorder) as (batcher, _):
            await classify(batcher, "first")
            with batcher.admit(1):  # one that is being decoded, say
                await classify(batcher, "second")
        assert recorder.batches[1:] == [(["second"], False)]

    asyncio.run(scenario())


def test_what_takes_long_does_not_stop_the_loop():
    async def scenario():
        recorder = Recorder(takes_s=1.5 * batching.IN_PLACE_S)
        async with running(recorder) as (batcher, _):
            for i in range(3):
                await classify(batcher, i)
        assert [here for _, here in recorder.batches] == [False, False, False]

    asyncio.run(scenario())


def test_while_the_device_does_something_else_nothing_is_run_here():
    async def scenario():
        recorder = Recorder()
        async with running(recorder) as (batcher, device):
            await classify(batcher, "first")
            at_work, go_on = threading.Event(), threading.Event()
            device.submit(lambda: (at_work.set(), go_on.wait(20)))
            assert at_work.wait(20)
            second = asyncio.create_task(classify(batcher, "second"))
            await asyncio.sleep(0.02)
            assert recorder.batches == [(["first"], False)]
            go_on.set()
            assert await second == ["second"]
        assert recorder.batches[1:] == [(["second"], False)]

    asyncio.run(scenario())


def test_an_error_here_is_its_request_s_alone():
    async def scenario():
        recorder = Recorder()
        async with running(recorder) as (batcher, _):
            await classify(batcher, "first")
            with pytest.raises(ValueError, match="cannot run this"):
                await classify(batcher, "poison")
            assert await classify(batcher, "next") == ["next"]
        assert [here for _, here in recorder.batches] == [False, True, True]
        assert batcher.in_flight == 0

    asyncio.run(scenario())
