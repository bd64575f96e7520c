"""How replicas learn that another version was activated."""

import threading
import time

import pytest

# Required: an activation is seen within 1 s. Asserted with room for a busy machine.
SEEN_WITHIN_S = 5.0


def test_the_active_version_is_reported_at_the_start(store, until, make_importance):
    version = store.publish(make_importance())
    changes, ups = [], []

    with store.watch(on_change=changes.append, on_store_up=ups.append):
        until(lambda: changes)

    assert (changes, ups) == ([version], [True])


def test_an_activation_is_seen_at_once(store, until, make_importance):
    older, changes = store.publish(make_importance(1)), []
    with store.watch(on_change=changes.append):
        until(lambda: changes)

        started = time.monotonic()
        newer = store.publish(make_importance(2))
        until(lambda: len(changes) == 2)
        store.activate(older)
        until(lambda: len(changes) == 3)

    assert time.monotonic() - started < SEEN_WITHIN_S
    assert changes == [older, newer, older]


def test_publishing_without_activating_reports_nothing(store, until, make_importance):
    changes = []
    with store.watch(on_change=changes.append):
        until(lambda: changes)
        store.publish(make_importance(1), activate=False)
        version = store.publish(make_importance(2))
        until(lambda: len(changes) == 2)

    assert changes == [None, version]


def test_a_change_made_while_the_watcher_was_cut_off_is_seen(backend, store, until, make_importance):
    older = store.publish(make_importance(1))
    changes, ups, gap_is_over = [], [], threading.Event()

    def on_store_up(up):
        ups.append(up)
        if not up:
            gap_is_over.wait(60)  # holds the watcher's thread before it connects again

    with store.watch(on_change=changes.append, on_store_up=on_store_up):
        until(lambda: changes)
        backend.kill()
        until(lambda: False in ups)
        backend.revive(store)
        newer = store.publish(make_importance(2))
        gap_is_over.set()
        until(lambda: len(changes) == 2)

    assert changes == [older, newer]
    assert ups == [True, False, True]


def test_a_store_that_lost_its_data_reports_that_nothing_is_active(store, until, make_importance):
    version, changes = store.publish(make_importance()), []
    with store.watch(on_change=changes.append), store.new_client() as client:
        until(lambda: changes)
        client.flushall()
        until(lambda: len(changes) == 2)

    assert changes == [version, None]


def test_a_callback_that_fails_is_called_again(embedded_store, until, make_importance, caplog):
    first, calls = embedded_store.publish(make_importance(1)), []

    def fail_once(version):
        calls.append(version)
        if len(calls) == 1:
            raise RuntimeError("could not load it")

    with embedded_store.watch(on_change=fail_once):
        until(lambda: len(calls) == 2)
        second = embedded_store.publish(make_importance(2))
        until(lambda: len(calls) == 3)

    assert calls == [first, first, second]
    assert "Traceback" in caplog.text and "could not load it" in caplog.text


@pytest.mark.parametrize("down", [False, True])
def test_a_watcher_stops_promptly(backend, store, until, down):
    ups = []
    watcher = store.watch(on_change=lambda version: None, on_store_up=ups.append).start()
    until(lambda: ups)
    if down:
        backend.kill()
        until(lambda: False in ups)

    started = time.monotonic()
    watcher.stop()

    assert time.monotonic() - started < SEEN_WITHIN_S
    until(lambda: not watcher._thread.is_alive())
