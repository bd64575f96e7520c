"""What a store promises, on the embedded server and on a real Redis."""

import hashlib
import threading
import time

import pytest
import torch

from importance_store import (
    CorruptImportance,
    ImportanceStore,
    NoActiveImportance,
    StoreFull,
    VersionConflict,
    VersionNotFound,
    WrongModel,
)
from importance_store.keys import Keys
from importance_store.store import PRUNED_AFTER_S

KEYS = Keys("toy")


def names(store):
    return [version.version for version in store.versions()]


def fields_of(store, version):
    with store.new_client() as client:
        return client.hgetall(KEYS.version(version))


def test_a_published_importance_is_loaded_as_it_was(store, make_importance):
    importance = make_importance(seed=1, classes=10, neurons=512)

    version = store.publish(importance)
    loaded = store.load()

    assert loaded.version == version == store.active_version()
    assert torch.equal(loaded.importance.scores, importance.scores)
    assert loaded.importance.metadata() == importance.metadata()


def test_the_listing_describes_each_version_newest_first(store, make_importance):
    first, second = make_importance(1), make_importance(2)
    versions = [store.publish(first), store.publish(second, activate=False)]

    newest, oldest = store.versions()

    assert [newest.version, oldest.version] == versions[::-1]
    assert (newest.active, oldest.active) == (False, True)
    assert newest.metadata == second.metadata()
    blob = fields_of(store, newest.version)[b"blob"]
    assert (newest.size_bytes, newest.sha256) == (len(blob), hashlib.sha256(blob).hexdigest())


def test_a_version_never_changes(store, make_importance):
    version = store.publish(make_importance(1))
    before = fields_of(store, version)

    store.publish(make_importance(2))
    store.publish(make_importance(3), activate=False)

    assert fields_of(store, version) == before


def test_an_empty_store_says_how_to_fill_it(store):
    assert store.active_version() is None
    assert store.versions() == []
    with pytest.raises(NoActiveImportance, match=r"no importance for model 'toy'; run 'igd rank'"):
        store.load()


def test_publishing_without_activating_leaves_the_active_version(store, make_importance):
    active = store.publish(make_importance(1))

    other = store.publish(make_importance(2), activate=False, expected_active="something else")

    assert store.active_version() == active
    assert names(store) == [other, active]


def test_rolling_back_serves_the_older_version_again(store, make_importance):
    older, newer = store.publish(make_importance(1)), store.publish(make_importance(2))

    store.activate(older, expected_active=newer)

    assert store.load().version == older
    assert names(store) == [newer, older]


def test_activating_the_active_version_does_nothing(store, make_importance):
    version = store.publish(make_importance())
    events = store.last_event()

    store.activate(version, expected_active="something else")

    assert (store.active_version(), store.last_event()) == (version, events)


def test_an_unknown_version_is_refused_with_a_list_of_the_known_ones(store, make_importance):
    version = store.publish(make_importance())

    with pytest.raises(VersionNotFound, match=rf"no version 'nonsense' of model 'toy'.*{version} \(active\)"):
        store.activate("nonsense")
    with pytest.raises(VersionNotFound, match="nonsense"):
        store.load("nonsense")


def test_models_do_not_see_each_other(backend, store, make_importance):
    store.publish(make_importance())

    assert backend.open(model="other").versions() == []


@pytest.mark.parametrize("expected", [None, "another"])
def test_a_publish_that_expected_another_active_version_leaves_no_trace(store, make_importance, expected):
    active = store.publish(make_importance(1), expected_active=None)
    event = store.last_event()

    with pytest.raises(VersionConflict, match=f"expected {expected or 'no version'} .* found {active}"):
        store.publish(make_importance(2), expected_active=expected)

    assert (store.active_version(), names(store), store.last_event()) == (active, [active], event)
    with store.new_client() as client:
        assert list(client.scan_iter("*staged*")) == []


def test_an_activation_that_expected_another_active_version_changes_nothing(store, make_importance):
    older, newer = store.publish(make_importance(1)), store.publish(make_importance(2))

    with pytest.raises(VersionConflict):
        store.activate(older, expected_active=None)

    assert store.active_version() == newer


def test_of_rival_threads_exactly_one_publishes(backend, store, make_importance):
    active = store.publish(make_importance())
    start, won, lost = threading.Barrier(4), [], []

    def rival(own_store, seed):
        importance = make_importance(seed)
        start.wait()
        try:
            won.append(own_store.publish(importance, expected_active=active))
        except VersionConflict as error:
            lost.append(error)

    rivals = [threading.Thread(target=rival, args=(backend.open(), seed)) for seed in range(4)]
    for thread in rivals:
        thread.start()
    for thread in rivals:
        thread.join()

    assert (len(won), len(lost)) == (1, 3)
    assert names(store) == [won[0], active]


def test_of_rival_processes_exactly_one_publishes(store, start_child, until, make_importance):
    active = store.publish(make_importance())
    moment = time.time() + 0.3

    rivals = [start_child("publish_at", url=store.url, expected_active=active, moment=moment) for _ in range(3)]
    until(lambda: all(rival.lines for rival in rivals))

    outcomes = sorted(rival.lines[0] for rival in rivals)
    assert outcomes[:2] == ["lost", "lost"]
    assert names(store) == [outcomes[2].removeprefix("won "), active]


def test_a_repeated_publish_changes_nothing(store, make_importance):
    """The client repeats a script when the connection breaks before the answer."""
    older = store.publish(make_importance(1), expected_active=None)
    newer = store.publish(make_importance(2))
    event = store.last_event()

    outcome, _ = store._publish_staged(older, True, None)

    assert outcome == b"ok"
    assert (store.active_version(), names(store), store.last_event()) == (newer, [newer, older], event)


def test_the_history_keeps_the_newest_versions(backend, make_importance):
    store = backend.open(history=3)

    versions = [store.publish(make_importance(seed)) for seed in range(5)]

    assert names(store) == versions[:1:-1]
    with pytest.raises(VersionNotFound):
        store.activate(versions[0])


def test_the_active_version_is_never_pruned(backend, make_importance):
    store = backend.open(history=2)
    active = store.publish(make_importance())

    versions = [store.publish(make_importance(seed), activate=False) for seed in range(4)]

    assert names(store) == [versions[-1], active]
    assert store.load().version == active


def test_a_reader_in_flight_can_finish_a_pruned_version(backend, make_importance):
    store = backend.open(history=1)
    pruned = store.publish(make_importance(1))
    kept = store.publish(make_importance(2))

    assert store.load(pruned).version == pruned
    with store.new_client() as client:
        assert 0 < client.ttl(KEYS.version(pruned)) <= PRUNED_AFTER_S
        assert client.ttl(KEYS.version(kept)) == -1


def test_the_importance_of_another_model_is_refused_by_name(store, make_importance):
    version = store.publish(make_importance(digest="sha256:mine"))

    assert store.load(model_digest="sha256:mine").version == version
    with pytest.raises(WrongModel, match=rf"{version} of model 'toy' .* sha256:mine, expected sha256:other"):
        store.load(model_digest="sha256:other")


def test_an_importance_of_unknown_weights_is_refused(store, make_importance):
    store.publish(make_importance(digest=""))

    with pytest.raises(WrongModel, match="weights unknown"):
        store.load(model_digest="sha256:mine")


def test_flipped_bits_are_refused(store, make_importance):
    version = store.publish(make_importance())
    with store.new_client() as client:
        blob = bytearray(client.hget(KEYS.version(version), "blob"))
        blob[-1] ^= 1
        client.hset(KEYS.version(version), "blob", bytes(blob))

    with pytest.raises(CorruptImportance, match=f"{version}: expected sha256"):
        store.load()


def test_bytes_that_are_no_importance_are_refused(store, make_importance):
    version = store.publish(make_importance())
    garbage = b"not safetensors"
    with store.new_client() as client:
        fields = {"blob": garbage, "sha256": hashlib.sha256(garbage).hexdigest(), "meta": "{"}
        client.hset(KEYS.version(version), mapping=fields)

    with pytest.raises(CorruptImportance, match=f"{version} is unreadable"):
        store.load()
    sound = store.publish(make_importance(), activate=False)
    assert [v.version for v in store.versions()] == [sound]  # a damaged version does not hide the others


def test_a_version_that_vanished_from_the_server_is_reported_missing(store, make_importance):
    version = store.publish(make_importance())
    with store.new_client() as client:
        client.delete(KEYS.version(version))

    with pytest.raises(VersionNotFound, match=version):
        store.load()
    assert store.versions() == []


def test_a_full_server_keeps_serving_and_rolling_back(store, make_importance):
    older, newer = store.publish(make_importance(1)), store.publish(make_importance(2))
    with store.new_client() as client:
        client.config_set("maxmemory", "100kb")

        with pytest.raises(StoreFull, match="maxmemory") as caught:
            store.publish(make_importance(3))
        assert "blob" not in str(caught.value)
        assert store.load().version == newer
        store.activate(older)
        assert store.load().version == older
        assert names(store) == [newer, older]

        client.config_set("maxmemory", "0")
    assert store.load(store.publish(make_importance(3))).importance.probe_set == "seed 3"


@pytest.mark.parametrize("model", ["", "a{b", "a}b"])
def test_a_model_name_that_would_mix_up_keys_is_refused(embedded_store, model):
    with embedded_store.new_client() as client, pytest.raises(ValueError, match="expected a model name"):
        ImportanceStore(client, model)


def test_a_history_of_nothing_is_refused(embedded_store):
    with embedded_store.new_client() as client, pytest.raises(ValueError, match="at least 1 version, got 0"):
        ImportanceStore(client, "toy", history=0)
