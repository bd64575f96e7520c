"""Open a store: on the Redis at a URL, or on the embedded server when there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from importance_store.changes import BLOCK_S, ChangeWatcher
from importance_store.embedded import EmbeddedServer
from importance_store.errors import StoreError
from importance_store.store import ImportanceStore

CONNECT_TIMEOUT_S = 1.0
SOCKET_TIMEOUT_S = 5.0


class ConnectedStore(ImportanceStore):
    """A store with its connections, and with the embedded server if it runs on that.

    Attributes:
        url: of the server, for others that need it (the job queue). It may hold a password: do not log it.
    """

    def __init__(self, url: str, *, model: str, history: int, server: EmbeddedServer | None = None) -> None:
        super().__init__(new_client(url), model, history=history)
        self.url = url
        self._embedded_server = server

    def new_client(self, *, socket_timeout_s: float = SOCKET_TIMEOUT_S, retries: int = 3) -> redis.Redis:
        """A client of its own, for what blocks: ``socket_timeout_s`` must be above the longest block."""
        return new_client(self.url, socket_timeout_s=socket_timeout_s, retries=retries)

    def watch(
        self, *, on_change: Callable[[str | None], object], on_store_up: Callable[[bool], object] = lambda up: None
    ) -> ChangeWatcher:
        """A ``ChangeWatcher`` of this store, to be started."""
        # No retries: after each lost connection the watcher has to read the pointer again.
        client = self.new_client(socket_timeout_s=SOCKET_TIMEOUT_S + BLOCK_S, retries=0)
        return ChangeWatcher(ImportanceStore(client, self.model), on_change=on_change, on_store_up=on_store_up)

    def close(self) -> None:
        """Close the connections, and stop the embedded server if this process runs it."""
        super().close()
        if self._embedded_server is not None:
            self._embedded_server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_store(*, redis_url: str | None, data_dir: Path, model: str, history: int = 20) -> ConnectedStore:
    """Connect, and check at once that the server answers and lets us in.

    Args:
        redis_url: ``redis://``, ``rediss://`` or ``unix://``; None starts the embedded server, or
            finds the one that another process runs in ``data_dir``.
        history: versions to keep for roll back.

    Raises:
        StoreError: ``StoreUnavailable``, ``StoreAuthenticationError``, ``EmbeddedServerError``, or a
            URL that is none.
    """
    server = EmbeddedServer(data_dir).start() if redis_url is None else None
    try:
        store = ConnectedStore(server.url if server else str(redis_url), model=model, history=history, server=server)
        store.ping()
    except BaseException:
        if server:
            server.close()
        raise
    return store


def new_client(url: str, *, socket_timeout_s: float = SOCKET_TIMEOUT_S, retries: int = 3) -> redis.Redis:
    """A client that gives up within about a second while the server is down.

    Raises:
        StoreError: not a Redis URL. The message does not quote it.
    """
    # Not timeouts: each would be waited for again.
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries, supported_errors=(RedisConnectionError,))
    try:
        _check_credentials(url)
        return redis.Redis.from_url(
            url,
            socket_timeout=socket_timeout_s,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            health_check_interval=15,
            retry=retry,
        )
    except ValueError:  # its message may quote a part of the password
        raise StoreError(
            "expected IGD_REDIS_URL like redis://user:password@host:6379/0, rediss://... or unix:///path, "
            "got something else; percent-encode special characters of the password"
        ) from None


def _check_credentials(url: str) -> None:
    """Refuse a raw ``/``, ``#`` or ``?`` in the password: its start would be taken for a host, and then logged."""
    parts = urlsplit(url)
    if parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment:
        raise ValueError
