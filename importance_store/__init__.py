"""The store of neuron importance: immutable versions in Redis, one of them active, changes announced.

One implementation, on a Redis of yours or on an embedded Valkey that it starts itself::

    with open_store(redis_url=None, data_dir=Path("data"), model="fashion-mnist") as store:
        version = store.publish(importance)
        store.load(model_digest=digest).importance
        store.watch(on_change=reload).start()

Publishing uploads the new version under a key that nobody reads, then one script makes it a
version, compares and sets the pointer to the active version, and announces it in a stream: a
crash at any moment leaves either the old state or the new one.
"""

from importance_store.changes import ChangeWatcher
from importance_store.connect import ConnectedStore, new_client, open_store
from importance_store.embedded import EmbeddedServer
from importance_store.errors import (
    CorruptImportance,
    EmbeddedServerError,
    NoActiveImportance,
    StoreAuthenticationError,
    StoreError,
    StoreFull,
    StoreUnavailable,
    VersionConflict,
    VersionNotFound,
    WrongModel,
)
from importance_store.records import LoadedImportance, StoredVersion
from importance_store.store import ANY, ImportanceStore

__all__ = [
    "ANY",
    "ChangeWatcher",
    "ConnectedStore",
    "CorruptImportance",
    "EmbeddedServer",
    "EmbeddedServerError",
    "ImportanceStore",
    "LoadedImportance",
    "NoActiveImportance",
    "StoreAuthenticationError",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "StoredVersion",
    "VersionConflict",
    "VersionNotFound",
    "WrongModel",
    "new_client",
    "open_store",
]
