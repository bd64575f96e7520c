"""The device: a thread, or a caller in its place, but never two at work."""

import threading

import pytest

from service.device import Device


@pytest.fixture
def device():
    device = Device()
    yield device
    device.shutdown()


def test_what_is_submitted_is_done_in_order_by_one_thread(device):
    done = [device.submit(lambda i=i: (i, threading.current_thread().name)) for i in range(5)]
    results = [future.result(20) for future in done]
    assert [i for i, _ in results] == [0, 1, 2, 3, 4]
    assert len({name for _, name in results}) == 1
    assert results[0][1] != threading.current_thread().name


def test_while_the_thread_rests_a_caller_does_the_work(device):
    assert device.run_here(threading.current_thread).result(0) is threading.current_thread()


def test_nothing_is_called_here_while_the_thread_is_at_work(device):
    at_work, go_on, called = threading.Event(), threading.Event(), []
    busy = device.submit(lambda: (at_work.set(), go_on.wait(20)))
    assert at_work.wait(20)
    assert device.run_here(lambda: called.append("here")) is None
    go_on.set()
    busy.result(20)
    assert called == []


def test_the_thread_waits_until_a_caller_has_done_its_work(device):
    order = []

    def here():
        waiting = device.submit(order.append, "thread")
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        order.append("here")
        return waiting

    device.run_here(here).result(0).result(20)
    assert order == ["here", "thread"]


def test_an_error_waits_in_the_result_and_the_device_goes_on(device):
    failed = device.run_here(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(0)
    assert device.run_here(lambda: "next").result(0) == "next"


def test_it_tells_whether_more_is_waiting(device):
    at_work, go_on = threading.Event(), threading.Event()
    assert not device.waiting
    first = device.submit(lambda: (at_work.set(), go_on.wait(20)))
    assert at_work.wait(20)
    assert not device.waiting
    second = device.submit(lambda: device.waiting)
    assert device.waiting
    go_on.set()
    first.result(20)
    assert second.result(20) is False
