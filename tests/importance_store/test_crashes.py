"""kill -9, of the publisher and of the server, at random moments."""

import random
import threading
import time

from importance_store import StoreUnavailable


def check_consistency(store):
    """The active version and everything listed can be loaded."""
    versions = [version.version for version in store.versions()]
    for version in versions:
        store.load(version)
    if versions:
        assert store.load().version in versions
    return versions


def test_killing_the_publisher_leaves_the_store_consistent(backend, start_child, until):
    store = backend.open(history=5)
    for _ in range(15):
        publisher = start_child("publish_forever", url=store.url, history=5)
        until(lambda publisher=publisher: publisher.lines)
        time.sleep(random.uniform(0, 0.03))
        publisher.kill()

        versions = check_consistency(store)
        acknowledged = publisher.lines[-1]
        # It may have died between the publication of the next one and saying so.
        assert acknowledged in versions[:2]
        assert store.active_version() == versions[0]


def test_killing_the_server_loses_nothing_that_was_acknowledged(backend, make_importance):
    store = backend.open(history=1000)
    importance = make_importance(classes=100, neurons=1024)
    acknowledged, done = [], threading.Event()

    def publish():
        while not done.is_set():
            try:
                acknowledged.append(store.publish(importance))
            except StoreUnavailable:
                time.sleep(0.01)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for _ in range(4):
            time.sleep(random.uniform(0.1, 0.3))
            backend.kill()
            backend.revive(store)
    finally:
        done.set()
        publisher.join()

    versions = check_consistency(store)
    assert len(acknowledged) > 4
    assert set(acknowledged) <= set(versions)


def test_a_client_recovers_by_itself_when_the_server_is_back(backend, store, make_importance):
    version = store.publish(make_importance())

    backend.kill()
    backend.revive(store)

    assert store.load().version == version
    store.publish(make_importance(2), expected_active=version)
