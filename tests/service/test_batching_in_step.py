"""When results are handed out: after the next batch has been prepared, which must not keep anybody waiting for long."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from service.batching import Batcher
from service.device import Device


class Gate:
    """Something on the device thread that waits to be let through, and tells that it has come."""

    def __init__(self):
        self.came, self._open = threading.Event(), threading.Event()

    def __call__(self):
        self.came.set()
        assert self._open.wait(20)

    def open(self):
        self._open.set()


@asynccontextmanager
async def running(run_batch, prepare):
    device = Device()
    batcher = Batcher(run_batch, device, max_batch_size=1, max_queue=100, prepare=prepare)
    batcher.start()
    try:
        yield batcher, device
    finally:
        await batcher.drain(10)
        device.shutdown()


async def came(gate):
    assert await asyncio.to_thread(gate.came.wait, 20)


async def is_answered(task):
    await asyncio.wait([task], timeout=0.1)
    return task.done()


def two_batches(gates, prepare, scenario, run_batch=lambda group, items: items):
    """Run a scenario with tasks of the items 0 and 1, in batches of one, the second waiting while the first runs."""

    def run(group, items):
        if ("run", items[0]) in gates:
            gates["run", items[0]]()
        return run_batch(group, items)

    async def main():
        async with running(run, prepare) as (batcher, device):
            first = asyncio.create_task(batcher.submit("a", [0]))
            await came(gates["run", 0])
            second = asyncio.create_task(batcher.submit("a", [1]))
            await asyncio.sleep(0)
            await scenario(first, second, device)

    asyncio.run(main())


def test_results_are_handed_out_when_the_next_batch_is_prepared_and_before_it_runs():
    gates = {("run", 0): Gate(), ("prepare", 1): Gate(), ("run", 1): Gate()}

    def prepare(group, items):
        if items == [1]:
            gates["prepare", 1]()
        return items

    async def scenario(first, second, device):
        gates["run", 0].open()
        await came(gates["prepare", 1])
        assert not await is_answered(first)
        gates["prepare", 1].open()
        await came(gates["run", 1])
        assert await first == [0]
        gates["run", 1].open()
        assert await second == [1]

    two_batches(gates, prepare, scenario)


@pytest.mark.parametrize("fails_in", ["prepare", "run"])
def test_results_are_handed_out_if_the_next_batch_fails(fails_in):
    gates = {("run", 0): Gate()}

    def step(name):
        def call(group, items):
            if name == fails_in and items == [1]:
                raise ValueError(f"cannot {name}")
            return items

        return call

    async def scenario(first, second, device):
        gates["run", 0].open()
        assert await first == [0]
        with pytest.raises(ValueError, match=f"cannot {fails_in}"):
            await second

    two_batches(gates, step("prepare"), scenario, run_batch=step("run"))


def test_results_do_not_wait_for_other_work_of_the_device():
    gates = {("run", 0): Gate()}
    other = Gate()

    async def scenario(first, second, device):
        device.submit(other)  # another importance, say, which takes a second
        gates["run", 0].open()
        await came(other)
        assert await is_answered(first)
        assert not second.done()
        other.open()
        assert await second == [1]

    two_batches(gates, lambda group, items: items, scenario)


def test_results_are_handed_out_if_nobody_wants_the_next_batch_any_more():
    gates = {("run", 0): Gate()}

    async def scenario(first, second, device):
        second.cancel()
        gates["run", 0].open()
        assert await first == [0]

    two_batches(gates, lambda group, items: items, scenario)
