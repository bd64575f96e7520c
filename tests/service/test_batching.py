"""The batcher: who waits for what, who gets which answer, and that nobody is left waiting."""

import asyncio
import random
import threading
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from service.batching import Batcher
from service.errors import NotReady, QueueFull

POISON = "poison"


class Device:
    """A run_batch that remembers what it was given; ``hold`` keeps it busy until ``release``."""

    def __init__(self):
        self.batches = []
        self._free = threading.Event()
        self._free.set()

    def hold(self):
        self._free.clear()

    def release(self):
        self._free.set()

    @property
    def seen(self):
        return [item for _, items in self.batches for item in items]

    def __call__(self, group, items):
        self.batches.append((group, items))
        assert self._free.wait(20)
        if POISON in items:
            raise ValueError("cannot run this")
        return [answer_of(group, item) for item in items]


def answer_of(group, item):
    return f"answer to {item} of {group}"


@asynccontextmanager
async def running(run_batch, *, max_batch_size=64, max_queue=1000, **options):
    """A batcher at work on a real thread; what it holds is let go in the end."""
    device = ThreadPoolExecutor(1)
    batcher = Batcher(run_batch, device, max_batch_size=max_batch_size, max_queue=max_queue, **options)
    batcher.start()
    try:
        yield batcher
    finally:
        if isinstance(run_batch, Device):
            run_batch.release()
        await batcher.drain(10)
        device.shutdown()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of what a thread does
            await asyncio.sleep(0.001)


async def start(batcher, *items, group="a"):
    """A task that submits, once its items are in the queue."""
    task = asyncio.create_task(batcher.submit(group, items))
    await asyncio.sleep(0)
    return task


async def occupy(batcher, device):
    """Keep the device busy with an item of its own."""
    device.hold()
    task = await start(batcher, "first")
    await until(lambda: device.batches)
    return task


def test_while_the_device_is_busy_requests_gather_and_then_go_as_one_batch():
    async def scenario():
        device = Device()
        async with running(device) as batcher:
            tasks = [await occupy(batcher, device)] + [await start(batcher, i) for i in range(10)]
            assert (device.seen, batcher.depth) == (["first"], 10)
            device.release()
            await asyncio.gather(*tasks)
        assert device.batches == [("a", ["first"]), ("a", list(range(10)))]

    asyncio.run(scenario())


def test_a_lone_request_waits_for_no_timer():
    async def scenario():
        def no_timer(*arguments, **options):
            raise AssertionError("the batcher set a timer")

        async with running(Device()) as batcher:
            loop = asyncio.get_running_loop()
            loop.call_at = loop.call_later = no_timer
            assert await batcher.submit("a", [1]) == [answer_of("a", 1)]
            del loop.call_at, loop.call_later

    asyncio.run(scenario())


def test_first_come_first_served_in_batches_of_the_maximum_size():
    async def scenario():
        device = Device()
        async with running(device, max_batch_size=4) as batcher:
            tasks = [await occupy(batcher, device)] + [await start(batcher, i) for i in range(10)]
            device.release()
            await asyncio.gather(*tasks)
        assert [items for _, items in device.batches[1:]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    asyncio.run(scenario())


def test_a_request_larger_than_a_batch_is_answered_in_order():
    async def scenario():
        device = Device()
        async with running(device, max_batch_size=4) as batcher:
            assert await batcher.submit("a", range(10)) == [answer_of("a", i) for i in range(10)]
        assert [len(items) for _, items in device.batches] == [4, 4, 2]

    asyncio.run(scenario())


def test_groups_are_never_mixed_and_keep_their_turn():
    async def scenario():
        device = Device()
        async with running(device) as batcher:
            tasks = [await occupy(batcher, device)]
            tasks += [await start(batcher, i, group=group) for i, group in enumerate("aabba")]
            device.release()
            await asyncio.gather(*tasks)
        assert device.batches[1:] == [("a", [0, 1]), ("b", [2, 3]), ("a", [4])]

    asyncio.run(scenario())


def test_only_the_culprit_of_a_failed_batch_gets_the_error(caplog):
    async def scenario():
        device = Device()
        async with running(device) as batcher:
            tasks = [await occupy(batcher, device)] + [await start(batcher, item) for item in (1, POISON, 3)]
            device.release()
            _, one, culprit, three = await asyncio.gather(*tasks, return_exceptions=True)
            assert (one, three) == ([answer_of("a", 1)], [answer_of("a", 3)])
            assert isinstance(culprit, ValueError)
            assert await batcher.submit("a", [4]) == [answer_of("a", 4)]
        assert [items for _, items in device.batches[1:]] == [[1, POISON, 3], [1], [POISON], [3], [4]]

    asyncio.run(scenario())
    assert "trying its images one by one" in caplog.text


def test_what_is_left_of_a_failed_request_is_not_run():
    async def scenario():
        device = Device()
        async with running(device, max_batch_size=2) as batcher:
            with pytest.raises(ValueError, match="cannot run"):
                await batcher.submit("a", [POISON, 1, 2, 3])
            assert await batcher.submit("a", [4]) == [answer_of("a", 4)]
        assert device.seen[-1] == 4 and 3 not in device.seen

    asyncio.run(scenario())


class AtOnce(Executor):
    """What is submitted is over before ``submit`` returns, as it may be on a thread."""

    def submit(self, call, /, *args, **kwargs):
        done = Future()
        done.set_result(call(*args, **kwargs))
        return done


def test_batches_that_are_over_at_once_are_settled_in_their_order():
    async def scenario():
        batcher = Batcher(Device(), AtOnce(), max_batch_size=2, max_queue=10)
        batcher.start()
        async with asyncio.timeout(5):
            assert await batcher.submit("a", range(5)) == [answer_of("a", i) for i in range(5)]

    asyncio.run(scenario())


def test_the_device_never_sees_what_a_cancelled_caller_left():
    async def scenario():
        device = Device()
        async with running(device) as batcher:
            tasks = [await occupy(batcher, device)] + [await start(batcher, 2 * i, 2 * i + 1) for i in range(3)]
            tasks[2].cancel()
            device.release()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[2], asyncio.CancelledError)
        assert outcomes[3] == [answer_of("a", 4), answer_of("a", 5)]
        assert device.seen == ["first", 0, 1, 4, 5]

    asyncio.run(scenario())


def test_a_caller_who_leaves_while_the_device_works_disturbs_nobody():
    async def scenario():
        device = Device()
        async with running(device) as batcher:
            gone = await occupy(batcher, device)
            gone.cancel()
            waiting = await start(batcher, 1)
            device.release()
            assert await waiting == [answer_of("a", 1)]

    asyncio.run(scenario())


def test_a_caller_who_leaves_a_failed_batch_is_not_tried_again():
    async def scenario():
        device = Device()
        async with running(device) as batcher:
            device.hold()
            tasks = [await start(batcher, 1, POISON), await start(batcher, 2), await start(batcher, 3)]
            await until(lambda: device.batches)
            tasks[1].cancel()
            device.release()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[2] == [answer_of("a", 3)] and device.batches[1:].count(("a", [2])) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("results", [[], ["one"], ["one", "two", "three"], None])
def test_a_wrong_number_of_results_is_an_error_and_no_mix_up(results):
    async def scenario():
        async with running(lambda group, items: results if len(items) == 2 else [items[0], "extra"]) as batcher:
            with pytest.raises((RuntimeError, TypeError)):
                await batcher.submit("a", [1, 2])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "error", [StopIteration(), asyncio.CancelledError(), CancelledError(), TimeoutError(), KeyError(1)], ids=repr
)
def test_whatever_the_device_raises_its_caller_gets_an_error(error):
    def fail(group, items):
        raise error

    async def scenario():
        async with running(fail) as batcher, asyncio.timeout(20):
            for _ in range(2):
                with pytest.raises((RuntimeError, TimeoutError, KeyError)):
                    await batcher.submit("a", [1])
            assert batcher.alive

    asyncio.run(scenario())


def test_a_full_queue_says_when_to_come_back():
    async def scenario():
        async with running(Device(), max_queue=4) as batcher:
            await batcher.submit("a", [1, 2, 3])  # so that it knows its speed
            with batcher.admit(3):
                with pytest.raises(QueueFull, match="3 images are in progress and the queue holds 4") as caught:
                    batcher.admit(2).__enter__()
                with batcher.admit(1):
                    assert batcher.in_flight == 4
            assert 1 <= int(caught.value.headers["Retry-After"]) <= 30
            assert batcher.in_flight == 0
            with batcher.admit(2):
                pass

    asyncio.run(scenario())


def test_a_request_larger_than_the_queue_is_let_in_when_alone():
    async def scenario():
        async with running(Device(), max_queue=4) as batcher:
            with batcher.admit(1), pytest.raises(QueueFull):
                batcher.admit(100).__enter__()
            with batcher.admit(100):
                assert len(await batcher.submit("a", range(100))) == 100

    asyncio.run(scenario())


def test_an_error_gives_the_places_back():
    async def scenario():
        async with running(Device()) as batcher:
            with pytest.raises(ValueError, match="cannot run"), batcher.admit(1):
                await batcher.submit("a", [POISON])
            assert batcher.in_flight == 0

    asyncio.run(scenario())


def test_draining_answers_all_that_was_admitted_and_refuses_what_comes_later():
    async def scenario():
        device = Device()

        async def request(item):
            with batcher.admit(1):
                await asyncio.sleep(0.02)  # its image is still being decoded when the draining starts
                return await batcher.submit("a", [item])

        async with running(device) as batcher:
            device.hold()
            tasks = [asyncio.create_task(request(i)) for i in range(20)]
            await until(lambda: batcher.in_flight == 20)
            draining = asyncio.create_task(batcher.drain(20))
            await asyncio.sleep(0)
            with pytest.raises(NotReady, match="shutting down"):
                batcher.admit(1).__enter__()
            assert batcher.alive and not batcher.accepting
            await until(lambda: device.batches)
            device.release()
            await draining
            assert await asyncio.gather(*tasks) == [[answer_of("a", i)] for i in range(20)]
            assert not batcher.alive

    asyncio.run(scenario())


@pytest.mark.parametrize("after", [0, 1])
def test_without_a_device_nobody_waits_for_ever(after):
    """It is lost before the first batch, or between two."""
    deaths = []

    async def scenario():
        device = Device()
        async with running(device, on_death=deaths.append) as batcher:
            if after:
                device.hold()
            tasks = [await start(batcher, "first")]
            if after:
                await until(lambda: device.batches)
            batcher._device.shutdown(wait=False)
            tasks.append(await start(batcher, "second"))
            device.release()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(outcomes[-1], NotReady) and "dispatcher died" in str(outcomes[-1])
            assert not batcher.alive

    asyncio.run(scenario())
    assert len(deaths) == 1 and isinstance(deaths[0], RuntimeError)


def test_draining_does_not_wait_for_a_stuck_device_for_ever():
    async def scenario():
        device = Device()

        async def request(item):
            with batcher.admit(1):
                return await batcher.submit("a", [item])

        async with running(device) as batcher:
            device.hold()
            stuck = asyncio.create_task(request("stuck"))
            await until(lambda: device.batches)
            waiting = asyncio.create_task(request("waiting"))
            await asyncio.sleep(0)
            await batcher.drain(0.05)
            for outcome in await asyncio.gather(stuck, waiting, return_exceptions=True):
                assert isinstance(outcome, NotReady) and "shutting down" in str(outcome)

    asyncio.run(scenario())


class Untakable:
    """A group that breaks the dispatcher when it is compared."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        raise MemoryError("a bug")


class Death(BaseException):
    """What no device should raise."""


def die(group, items):
    raise Death("of the device")


@pytest.mark.parametrize(
    ("run_batch", "group", "error"),
    [(Device(), Untakable(), MemoryError), (die, "a", Death)],
    ids=["in the dispatcher", "on the device"],
)
def test_when_the_dispatcher_dies_everything_that_waits_fails_and_somebody_is_told(run_batch, group, error):
    async def scenario():
        deaths = []
        async with running(run_batch, max_batch_size=2, on_death=deaths.append) as batcher:
            tasks = [asyncio.create_task(batcher.submit(group, [2 * i, 2 * i + 1])) for i in range(5)]
            async with asyncio.timeout(20):
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, NotReady) for outcome in outcomes), outcomes
            assert [type(death) for death in deaths] == [error]
            assert not batcher.alive and not batcher.accepting and batcher.depth == 0
            with pytest.raises(NotReady):
                await batcher.submit("a", [1])
            with pytest.raises(NotReady):
                batcher.admit(1).__enter__()

    asyncio.run(scenario())


def test_each_of_a_thousand_requests_gets_its_own_answer():
    async def request(batcher, dice, number):
        await asyncio.sleep(dice.random() / 20)
        group, items = dice.choice("abc"), [(number, i) for i in range(dice.randint(1, 5))]
        if dice.random() < 0.05:
            items[dice.randrange(len(items))] = POISON
        submitted = asyncio.create_task(batcher.submit(group, items))
        if dice.random() < 0.1:
            await asyncio.sleep(dice.random() / 100)
            submitted.cancel()
        try:
            assert await submitted == [answer_of(group, item) for item in items] and POISON not in items
        except asyncio.CancelledError:
            return "cancelled"
        except ValueError:
            assert POISON in items
            return "failed"
        return "answered"

    async def scenario():
        dice = random.Random(0)
        async with running(Device(), max_batch_size=16) as batcher:
            outcomes = await asyncio.gather(*(request(batcher, dice, number) for number in range(1000)))
            assert batcher.depth == 0
        assert outcomes.count("answered") > 600 and outcomes.count("failed") > 10

    asyncio.run(scenario())
