"""The versions of one model's importance in Redis, one of which is active."""

import logging
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Literal, TypeAlias, cast

import redis
from ulid import ULID

from defense.importance import NeuronImportance
from importance_store import scripts
from importance_store.errors import (
    CorruptImportance,
    NoActiveImportance,
    StoreUnavailable,
    VersionConflict,
    VersionNotFound,
    WrongModel,
    translated_errors,
)
from importance_store.keys import Keys
from importance_store.records import LoadedImportance, StoredVersion, from_fields, metadata_from, to_fields

logger = logging.getLogger(__name__)

STAGED_FOR_S = 3600
PRUNED_AFTER_S = 300
MAX_EVENTS = 1000


class Unchecked(Enum):
    """Type of ``ANY``: whatever version is active now."""

    ANY = "any"


ANY = Unchecked.ANY
Expected: TypeAlias = str | Literal[Unchecked.ANY] | None


class ImportanceStore:
    """Publish, activate, roll back and load the importance of one model.

    A version never changes once published. Every method may be called from any thread, and raises
    ``StoreUnavailable``, ``StoreAuthenticationError`` or another ``StoreError`` of the server's.

    Args:
        client: answers bytes (``decode_responses=False``).
        history: published versions to keep for roll back; the active one is always kept.

    Raises:
        ValueError: a history below 1, or a model name that is empty or has braces.
    """

    def __init__(self, client: redis.Redis, model: str, *, history: int = 20) -> None:
        if history < 1:
            raise ValueError(f"expected a history of at least 1 version, got {history}")
        self.model = model
        self._client = client
        self._history = history
        self._keys = Keys(model)
        self._server = server_name(client)
        self._run_publish = client.register_script(scripts.PUBLISH)
        self._run_activate = client.register_script(scripts.ACTIVATE)

    def publish(self, importance: NeuronImportance, *, activate: bool = True, expected_active: Expected = ANY) -> str:
        """Store a new version and, unless told otherwise, make it the active one.

        Args:
            expected_active: compare-and-set, checked only when activating: publish only if this
                version (None: no version) is active at that moment.

        Returns:
            The new version, a ULID.

        Raises:
            VersionConflict: another version is active; nothing was stored.
            StoreFull: no room; nothing was stored.
        """
        version = str(ULID())
        with self._translated():
            self._stage(version, importance)
            outcome, active = self._publish_staged(version, activate, expected_active)
        if outcome == b"missing":
            raise StoreUnavailable(f"the store at {self._server} lost version {version} before it was published; retry")
        self._check_conflict(outcome, active, expected_active)
        return version

    def activate(self, version: str, *, expected_active: Expected = ANY) -> None:
        """Make a published version the active one, or roll back to it. Activating the active one does nothing.

        Raises:
            VersionNotFound: no such version, or it was pruned.
            VersionConflict: another version than ``expected_active`` is active.
        """
        keys = [self._keys.active, self._keys.history, self._keys.events, self._keys.version(version)]
        with self._translated():
            outcome, active = cast(
                list[bytes],
                self._run_activate(keys=keys, args=[version, *_compare(expected_active), MAX_EVENTS]),
            )
        if outcome == b"missing":
            raise self._not_found(version)
        self._check_conflict(outcome, active, expected_active)

    def active_version(self) -> str | None:
        """The version to serve, or None before the first one."""
        with self._translated():
            active = cast(bytes | None, self._client.get(self._keys.active))
        return None if active is None else active.decode()

    def load(self, version: str | None = None, *, model_digest: str | None = None) -> LoadedImportance:
        """Read a version, by default the active one.

        Args:
            model_digest: digest of the weights that it will defend; None does not compare.

        Raises:
            NoActiveImportance: nothing is published yet.
            VersionNotFound: no such version.
            CorruptImportance: the bytes are not the ones that were published.
            WrongModel: it was made for other weights.
        """
        wanted = version if version is not None else self._active_or_raise()
        try:
            importance = self._read(wanted)
        except VersionNotFound:
            if version is not None or self.active_version() == wanted:
                raise
            return self.load(model_digest=model_digest)  # replaced and pruned since the pointer was read
        if model_digest is not None and importance.model_digest != model_digest:
            raise WrongModel(
                f"importance {wanted} of model {self.model!r} was made for weights "
                f"{importance.model_digest or 'unknown'}, expected {model_digest}; "
                "rank this model with 'igd rank' or POST /rank-neurons"
            )
        return LoadedImportance(wanted, importance)

    def versions(self) -> list[StoredVersion]:
        """The published versions, newest first, without their scores."""
        with self._translated():
            # No MULTI: a full Redis refuses it, and this is how one finds the version to roll back to.
            index = self._client.pipeline(transaction=False)
            index.get(self._keys.active)
            index.zrevrange(self._keys.history, 0, -1)
            active, history = index.execute()
            rows = self._client.pipeline(transaction=False)
            for version in history:
                rows.hmget(self._keys.version(version.decode()), ["meta", "sha256"])
                rows.hstrlen(self._keys.version(version.decode()), "blob")
            answers = rows.execute()
        rows_of = zip(history, answers[::2], answers[1::2], strict=True)
        stored = (
            _stored_version(version.decode(), version == active, meta, sha256, size)
            for version, (meta, sha256), size in rows_of
            if sha256 is not None  # pruned since the history was read
        )
        return [version for version in stored if version]

    def ping(self) -> None:
        """Raise a ``StoreError`` unless the server answers."""
        with self._translated():
            self._client.ping()

    def last_event(self) -> str:
        """Id of the newest change event; ``"0-0"`` before the first."""
        with self._translated():
            events = cast(list[Any], self._client.xrevrange(self._keys.events, count=1))
        return events[0][0].decode() if events else "0-0"

    def wait_for_event(self, *, after: str, timeout_s: float) -> str:
        """Block until an event newer than ``after``; its id, or ``after`` itself after ``timeout_s``."""
        with self._translated():
            streams = cast(list[Any], self._client.xread({self._keys.events: after}, block=round(timeout_s * 1000)))
        return streams[0][1][-1][0].decode() if streams else after

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _translated(self) -> AbstractContextManager[None]:
        return translated_errors(self._server)

    def _stage(self, version: str, importance: NeuronImportance) -> None:
        """Upload under a key that nobody reads: a publisher that dies here leaves nothing but a key that expires."""
        staged = self._keys.staged(version)
        transaction = self._client.pipeline(transaction=True)
        transaction.hset(staged, mapping=cast(dict[Any, Any], to_fields(importance)))
        transaction.expire(staged, STAGED_FOR_S)
        transaction.execute()

    def _publish_staged(self, version: str, activate: bool, expected: Expected) -> list[bytes]:
        keys = self._keys
        answer = self._run_publish(
            keys=[keys.active, keys.history, keys.events, keys.staged(version), keys.version(version)],
            args=[
                version,
                int(activate),
                *_compare(expected),
                self._history,
                keys.version_prefix,
                PRUNED_AFTER_S,
                MAX_EVENTS,
            ],
        )
        return cast(list[bytes], answer)

    def _check_conflict(self, outcome: bytes, active: bytes, expected: Expected) -> None:
        if outcome == b"conflict":
            raise VersionConflict(
                f"expected {expected or 'no version'} of {self.model!r} to be active, found "
                f"{active.decode() or 'no version'}; look at the active version and try again"
            )

    def _active_or_raise(self) -> str:
        active = self.active_version()
        if active is None:
            raise NoActiveImportance(
                f"no importance for model {self.model!r}; run 'igd rank' or POST /rank-neurons first"
            )
        return active

    def _read(self, version: str) -> NeuronImportance:
        with self._translated():
            blob, sha256 = cast(list[bytes | None], self._client.hmget(self._keys.version(version), ["blob", "sha256"]))
        if blob is None:
            raise self._not_found(version)
        return from_fields(version, blob, sha256)

    def _not_found(self, version: str) -> VersionNotFound:
        stored = ", ".join(f"{v.version} (active)" if v.active else v.version for v in self.versions())
        return VersionNotFound(
            f"no version {version!r} of model {self.model!r}; expected one of: {stored or 'none, nothing is published'}"
        )


def _compare(expected: Expected) -> list[int | str]:
    """Whether to compare, and with what; the scripts write "no version" as the empty string."""
    return [0, ""] if expected is ANY else [1, expected or ""]


def _stored_version(version: str, active: bool, meta: bytes | None, sha256: bytes, size: int) -> StoredVersion | None:
    try:
        return StoredVersion(version, active, metadata_from(version, meta), size, sha256.decode())
    except CorruptImportance as error:  # one damaged version must not hide the others
        logger.error("not listed: %s", error)
        return None


def server_name(client: redis.Redis) -> str:
    """Host and port, or the socket: never the URL, which may hold a password."""
    where = client.connection_pool.connection_kwargs
    return str(where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}")
