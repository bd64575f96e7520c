"""A batcher before a device of a known cost, in simulated time, and requests to it."""

import asyncio
import random
from contextlib import asynccontextmanager

from service.batching import Batcher
from simulated_time import SimulatedDevice, simulate

BATCH_S, ITEM_S = 0.012, 0.0008  # what a batch costs, and each item in it


@asynccontextmanager
async def batching(loop, *, cost_s=(BATCH_S, ITEM_S), awaits_returns=False, **options):
    """``awaits_returns``: the batcher is told how long batches take; else it takes all items for quick ones."""
    device = SimulatedDevice(loop, lambda count: cost_s[0] + cost_s[1] * count)
    options = {
        "max_batch_size": 32,
        "max_queue": 10_000,
        "clock": loop.time if awaits_returns else lambda: 0.0,
    } | options
    batcher = Batcher(device.run_batch, device, **options)
    batcher.start()
    try:
        yield batcher, device
    finally:
        await batcher.drain(60)


async def at(loop, moment, batcher, item, group="a"):
    """Submit at a moment; the seconds until the answer."""
    await asyncio.sleep(moment - loop.time())
    assert await batcher.submit(group, [item]) == [item]
    return loop.time() - moment


def run(arrivals, **options):
    """Submit item i at ``arrivals[i]``: the latencies, and the batches as (when, items)."""

    async def scenario(loop):
        async with batching(loop, **options) as (batcher, device):
            latencies = await asyncio.gather(*(at(loop, when, batcher, i) for i, when in enumerate(arrivals)))
        return latencies, device.batches

    return simulate(scenario)


async def drained_with_a_request_waiting(loop, batcher):
    """Begin to drain a millisecond after a request has come; when it is over."""
    with batcher.admit(1):
        request = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.sleep(0.001)
        drained = asyncio.create_task(batcher.drain(60))
        await request
    await drained
    return loop.time()


def poisson(rate, count, seed=0):
    dice, moment = random.Random(seed), 0.0
    return [moment := moment + dice.expovariate(rate) for _ in range(count)]
