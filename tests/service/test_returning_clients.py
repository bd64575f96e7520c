"""Whether a batch waits for those who were just answered, in simulated time."""

import asyncio
import statistics
from itertools import pairwise

import pytest

from service.batching import Batcher
from simulated_batching import at, batching, drained_with_a_request_waiting, poisson, run
from simulated_time import SimulatedDevice, simulate

LONG = (0.012, 0.005)  # what a batch costs, and each item: one of 8 takes 52 ms, and may be waited for 10.4
WAITS = {"cost_s": LONG, "awaits_returns": True}


def cost_s(count):
    return LONG[0] + LONG[1] * count


def clients(number, rounds, think_s, *, images=1, spread=False, **options):
    """Clients that send again so long after each answer, or in equal steps up to that: the batches as (when, items)."""

    async def client(loop, batcher, i):
        await asyncio.sleep(0.001 * i)
        for _ in range(rounds):
            await asyncio.sleep(think_s * ((1 + i) / number if spread else 1))
            await batcher.submit("a", [i] * images)

    async def scenario(loop):
        async with batching(loop, **{"cost_s": LONG, "max_batch_size": 64} | options) as (batcher, device):
            await asyncio.gather(*(client(loop, batcher, i) for i in range(number)))
        return device.batches

    return simulate(scenario)


def sizes(batches):
    return [len(items) for _, items in batches]


@pytest.mark.parametrize("number", [2, 3, 8, 16])
def test_clients_that_wait_for_their_answers_are_served_together(number):
    batches = clients(number, 20, think_s=0.001, awaits_returns=True)
    assert set(sizes(batches[4:-3])) == {number}
    gaps = [later - when for (when, _), (later, _) in pairwise(batches[4:-3])]
    assert gaps == pytest.approx([cost_s(number) + 0.001] * len(gaps))  # not a moment longer
    alternating = clients(number, 20, think_s=0.001)
    assert max(sizes(alternating[4:-3])) < number and alternating[-1][0] > batches[-1][0]


def test_clients_with_many_images_are_served_together():
    batches = clients(2, 20, think_s=0.001, images=7, awaits_returns=True)
    assert set(sizes(batches[4:-3])) == {14}


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (17, {}),  # of which a quarter is 16
        (8, {"cost_s": (0.001, 0.0018)}),  # 1.9 ms an item
        (8, {"max_wait_s": 0.003}),
        (1, {}),
    ],
)
def test_elsewhere_nobody_is_waited_for(number, options):
    assert clients(number, 20, 0.001, awaits_returns=True, **options) == clients(number, 20, 0.001, **options)


def test_a_lone_client_does_not_wait_for_itself():
    """After a request of 8 images comes one of one, in time for a window."""

    async def scenario(loop):
        async with batching(loop, **WAITS) as (batcher, _):
            began = []
            for count in [8, 1, 1] * 20:
                began.append(loop.time())
                await batcher.submit("a", [0] * count)
                assert loop.time() - began[-1] == pytest.approx(cost_s(count))

    simulate(scenario)


def test_those_who_do_not_come_are_waited_for_ever_more_seldom():
    arrivals = poisson(rate=100, count=2000)
    latencies, batches = run(arrivals, **WAITS)
    ends = [when + cost_s(len(items)) for when, items in batches]
    ready = [max(end, arrivals[items[0]]) for end, (_, items) in zip(ends, batches[1:], strict=False)]
    waits = [when - since for since, (when, _) in zip(ready, batches[1:], strict=True) if when - since > 1e-9]
    assert 5 <= len(waits) <= len(batches) / 10
    assert max(waits) <= 0.2 * cost_s(8) + 1e-9
    assert statistics.fmean(latencies) < 1.04 * statistics.fmean(run(arrivals, cost_s=LONG)[0])


@pytest.mark.parametrize(("think_s", "together"), [(0.004, True), (0.008, False)])  # soon is until 5.2 ms
def test_clients_that_come_late_are_not_waited_for(think_s, together):
    batches = clients(8, 100, think_s=think_s, spread=True, awaits_returns=True)
    assert (sizes(batches).count(8) > 90) == together
    assert (sizes(batches).count(8) < 20) == (not together)


def test_after_waits_in_vain_clients_that_do_come_are_waited_for_again():
    async def scenario(loop):
        async with batching(loop, **WAITS) as (batcher, device):
            for _ in range(3):  # pairs that do not come again
                await asyncio.gather(batcher.submit("a", [0]), batcher.submit("a", [0]))
                await at(loop, loop.time() + 0.001, batcher, 0)
                await asyncio.sleep(1)
            begun = len(device.batches)

            async def client(i):
                for _ in range(40):
                    await batcher.submit("a", [i])
                    await asyncio.sleep(0.0005 * (1 + i))

            await asyncio.gather(*map(client, range(8)))
            return sizes(device.batches[begun:])

    found = simulate(scenario)
    assert set(found[-20:-2]) == {8}


def test_requests_long_after_a_window_say_nothing_of_returns():
    async def scenario(loop):
        async with batching(loop, **WAITS) as (batcher, _):
            for _ in range(10):
                await asyncio.gather(batcher.submit("a", [0]), batcher.submit("a", [0]))
                await asyncio.sleep(1)
            return batcher._returning._misses, batcher._returning._skips

    assert simulate(scenario) == (0, 0)


@pytest.mark.parametrize(("before", "waited_s"), [(8, 0.2 * cost_s(8)), (1, 0.0)])
def test_a_stranger_waits_for_a_fifth_of_a_batch_s_time_at_most(before, waited_s):
    moment = cost_s(before) + 0.001
    latencies, batches = run([0.0] * before + [moment], **WAITS)
    assert sizes(batches) == [before, 1]
    assert latencies[-1] == pytest.approx(max(moment, cost_s(before) + waited_s) - moment + cost_s(1))


def test_those_who_left_are_not_waited_for():
    async def scenario(loop):
        async with batching(loop, **WAITS) as (batcher, _):
            requests = [asyncio.create_task(batcher.submit("a", [i])) for i in range(8)]
            await asyncio.sleep(0.001)
            for request in requests[1:]:
                request.cancel()
            await requests[0]
            began = loop.time()
            await batcher.submit("a", [0])
            assert loop.time() - began == pytest.approx(cost_s(1))

    simulate(scenario)


def test_a_batch_that_was_tried_one_by_one_says_nothing_of_times():
    def run_batch(group, items):
        device.run_batch(group, items)
        if "poison" in items:
            raise ValueError("poison")
        return items

    async def scenario(loop):
        nonlocal device
        device = SimulatedDevice(loop, cost_s)
        batcher = Batcher(run_batch, device, max_batch_size=64, max_queue=100, clock=loop.time)
        batcher.start()
        answers = [asyncio.create_task(batcher.submit("a", [item])) for item in ["poison", 1, 2]]
        await asyncio.gather(*answers, return_exceptions=True)
        began = loop.time()
        await batcher.submit("a", ["a stranger"])
        assert loop.time() - began == pytest.approx(cost_s(1))
        await batcher.drain(60)

    device = None
    simulate(scenario)


def test_draining_does_not_wait_for_returns():
    async def scenario(loop):
        async with batching(loop, cost_s=(0, 10.0), awaits_returns=True) as (batcher, _):
            await asyncio.gather(batcher.submit("a", [1]), batcher.submit("a", [2]))  # for 20 s, and 4 more
            return await drained_with_a_request_waiting(loop, batcher)

    assert simulate(scenario) < 30.2
