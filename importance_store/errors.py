"""What can go wrong with the store, and how the errors of the Redis client become these.

::

    StoreError
    ├── StoreUnavailable           unreachable, still loading, or the connection was lost
    ├── StoreAuthenticationError   wrong password, or a user that may not do this
    ├── StoreFull                  no memory or no disk left for another version
    ├── VersionNotFound            never published, or pruned since
    │   └── NoActiveImportance     nothing is published for this model yet
    ├── VersionConflict            compare-and-set lost: another version is active
    ├── CorruptImportance          the stored bytes are not the ones that were published
    ├── WrongModel                 the importance was made for other weights
    └── EmbeddedServerError        the embedded server cannot be started

After ``StoreUnavailable`` a write may or may not have happened; all of them may be repeated.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from redis import exceptions as redis_errors


class StoreError(Exception):
    """Base of every error this package raises on purpose."""


class StoreUnavailable(StoreError):
    """The server is unreachable, still loading, or the connection was lost."""


class StoreAuthenticationError(StoreError):
    """The password is wrong, or the user may not run this command."""


class StoreFull(StoreError):
    """The server has no memory or no disk left; nothing was changed."""


class VersionNotFound(StoreError):
    """The version was never published, or was pruned since."""


class NoActiveImportance(VersionNotFound):
    """Nothing is published for this model yet."""


class VersionConflict(StoreError):
    """Another version is active than the caller expected; nothing was changed."""


class CorruptImportance(StoreError):
    """The stored bytes are not the ones that were published."""


class WrongModel(StoreError):
    """The importance was made for other weights than the ones at hand."""


class EmbeddedServerError(StoreError):
    """The embedded server cannot be started."""


@contextmanager
def translated_errors(server: str) -> Iterator[None]:
    """Raise this package's errors in place of the Redis client's; ``server`` is its name in messages."""
    try:
        yield
    except redis_errors.RedisError as error:
        raise _translated(error, server) from error


def _translated(error: redis_errors.RedisError, server: str) -> StoreError:
    # A pipeline's message quotes the command, and so the bytes of the importance; the reason comes after it.
    reason = str(error).rpartition("caused error: ")[2]
    if isinstance(error, _DENIED):
        return StoreAuthenticationError(
            f"the store at {server} refused us ({reason}); check user and password in IGD_REDIS_URL, "
            "and that the ACL allows '~igd:* ~rq:* &* +@all -@admin -@dangerous'"
        )
    if isinstance(error, redis_errors.OutOfMemoryError) or reason.startswith("MISCONF"):
        return StoreFull(
            f"the store at {server} is full, nothing was changed ({reason}); "
            "raise its maxmemory or free its disk, then try again"
        )
    if isinstance(error, _UNAVAILABLE):
        return StoreUnavailable(
            f"the store at {server} does not answer ({reason}); check that it runs and that IGD_REDIS_URL names it"
        )
    return StoreError(f"the store at {server} answered with an error ({reason}); is it Redis 7 or newer, or Valkey?")


_DENIED = (
    redis_errors.AuthenticationError,
    redis_errors.AuthenticationWrongNumberOfArgsError,
    redis_errors.AuthorizationError,
    redis_errors.NoPermissionError,
)
_UNAVAILABLE = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,  # a primary that was just demoted
    redis_errors.ClusterDownError,
)
