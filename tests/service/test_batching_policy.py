"""When a batch leaves and with whom, in simulated time: every figure below follows from the policy alone."""

import asyncio
import statistics

import pytest

from service.errors import QueueFull
from simulated_batching import BATCH_S, ITEM_S, at, batching, drained_with_a_request_waiting, poisson, run
from simulated_time import simulate


def test_a_lone_request_is_run_at_once():
    latencies, batches = run([1.0])
    assert batches == [(1.0, [0])]
    assert latencies == [pytest.approx(BATCH_S + ITEM_S)]


def test_when_the_device_is_free_it_takes_all_that_came_meanwhile():
    _, batches = run([0, 0.001, 0.002, 0.0127])
    assert batches == [(0, [0]), (pytest.approx(BATCH_S + ITEM_S), [1, 2, 3])]


def test_what_comes_while_a_batch_waits_for_nothing_goes_with_the_next():
    _, batches = run([0, 0.001, 0.013])
    assert [items for _, items in batches] == [[0], [1], [2]]


def test_with_a_wait_a_batch_leaves_when_its_oldest_item_has_waited():
    latencies, batches = run([0, 0.004, 0.0099, 0.0101], max_wait_s=0.010)
    assert batches[0] == (pytest.approx(0.010), [0, 1, 2])
    assert latencies[0] == pytest.approx(0.010 + BATCH_S + 3 * ITEM_S)


def test_with_a_wait_a_full_batch_leaves_at_once():
    _, batches = run([0, 0.001, 0.002, 0.003], max_wait_s=0.010, max_batch_size=3)
    assert batches[0] == (pytest.approx(0.002), [0, 1, 2])


def test_time_spent_waiting_for_the_device_counts_as_waiting():
    _, batches = run([0, 0.011], max_wait_s=0.010)  # the device is busy from 0.010 to 0.0228
    assert batches[1] == (pytest.approx(0.010 + BATCH_S + ITEM_S), [1])


def test_who_leaves_during_the_wait_does_not_make_others_wait():
    async def scenario(loop):
        async with batching(loop, max_wait_s=0.010) as (batcher, device):
            left = asyncio.create_task(at(loop, 0.0, batcher, "left"))
            stays = asyncio.create_task(at(loop, 0.004, batcher, "stays"))
            await asyncio.sleep(0.006)
            left.cancel()
            await stays
            return device.batches

    ((when, items),) = simulate(scenario)
    assert items == ["stays"] and when <= 0.014 + 1e-9


def test_a_wait_strands_no_group():
    async def scenario(loop):
        async with batching(loop, max_wait_s=0.010) as (batcher, device):
            await asyncio.gather(*(at(loop, 0.001 * i, batcher, i, group=i % 2) for i in range(6)))
        return device.batches

    assert [items for _, items in simulate(scenario)] == [[0], [1], [2], [3], [4], [5]]


def test_draining_does_not_sit_out_the_wait():
    async def scenario(loop):
        async with batching(loop, max_wait_s=5.0) as (batcher, _):
            return await drained_with_a_request_waiting(loop, batcher)

    assert simulate(scenario) < 0.1


@pytest.mark.parametrize(("max_queue", "expected_s"), [(50, 1), (1000, 1000 * (BATCH_S + ITEM_S)), (9000, 30)])
def test_retry_after_is_the_time_that_the_queue_takes_at_the_present_rate(max_queue, expected_s):
    """Rounded up to whole seconds, and 30 s at most."""

    async def scenario(loop):
        async with batching(loop, max_batch_size=1, max_queue=max_queue) as (batcher, _):
            await asyncio.gather(*(at(loop, 0.0, batcher, i) for i in range(20)))  # 78 a second
            with batcher.admit(max_queue), pytest.raises(QueueFull) as full, batcher.admit(1):
                pass
            return int(full.value.headers["Retry-After"])

    assert simulate(scenario) == pytest.approx(expected_s, abs=1)


def test_retry_after_counts_what_comes_before_the_device():
    async def scenario(loop):
        async with batching(loop, max_queue=10) as (batcher, _):

            async def decode_and_submit(item):
                with batcher.admit(1):
                    await asyncio.sleep(2 * (1 + item))  # one after the other
                    await batcher.submit("a", [item])

            await asyncio.sleep(100)  # with nothing to do, which says nothing of the rate
            await asyncio.gather(*(decode_and_submit(i) for i in range(10)))
            with batcher.admit(10), pytest.raises(QueueFull) as full, batcher.admit(1):
                pass
            return int(full.value.headers["Retry-After"])

    assert simulate(scenario) == pytest.approx(20, abs=1)


def percentiles(latencies):
    cuts = statistics.quantiles(latencies, n=100)
    return 1000 * cuts[49], 1000 * cuts[98]


@pytest.mark.parametrize("awaits_returns", [False, True])
def test_at_300_requests_a_second_late_binding_has_the_latency_that_was_published(awaits_returns):
    """24 and 36 ms (p50 and p99) without a wait, 30 and 42 ms with one of 20 ms."""
    arrivals = poisson(rate=300, count=6000)

    p50, p99 = percentiles(run(arrivals, awaits_returns=awaits_returns)[0])
    waiting_p50, waiting_p99 = percentiles(run(arrivals, max_wait_s=0.020)[0])

    assert (p50, p99) == (pytest.approx(24, abs=2.5), pytest.approx(36, abs=3))
    assert (waiting_p50, waiting_p99) == (pytest.approx(30, abs=3), pytest.approx(42, abs=4))


@pytest.mark.parametrize("awaits_returns", [False, True])
def test_beyond_saturation_the_device_runs_full_batches_only(awaits_returns):
    """The most it can do is 32 items in 37.6 ms, 851 a second."""
    _, batches = run(poisson(rate=1300, count=4000), awaits_returns=awaits_returns)
    assert statistics.fmean(len(items) for _, items in batches[3:-1]) > 31.5
