"""A version as it lies in Redis: fields of a hash, checked on the way out."""

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

from defense.errors import ImportanceError
from defense.importance import NeuronImportance
from importance_store.errors import CorruptImportance


class LoadedImportance(NamedTuple):
    """An importance and the version it was loaded as."""

    version: str
    importance: NeuronImportance


@dataclass(frozen=True)
class StoredVersion:
    """One line of the history: everything about a version but its scores.

    Attributes:
        metadata: what ``NeuronImportance.metadata`` said when it was published.
        size_bytes: length of the safetensors bytes.
        sha256: of those bytes, in hex.
    """

    version: str
    active: bool
    metadata: dict[str, object]
    size_bytes: int
    sha256: str


def to_fields(importance: NeuronImportance) -> dict[str, bytes | str]:
    """The hash of one version. The metadata is kept apart, so that a listing does not read the scores."""
    blob = importance.to_bytes()
    return {"blob": blob, "sha256": hashlib.sha256(blob).hexdigest(), "meta": json.dumps(importance.metadata())}


def from_fields(version: str, blob: bytes, sha256: bytes | None) -> NeuronImportance:
    """Parse the bytes of a version.

    Raises:
        CorruptImportance: they are not the ones that were published, or not an importance.
    """
    expected, found = (sha256 or b"").decode(errors="replace"), hashlib.sha256(blob).hexdigest()
    if found != expected:
        raise CorruptImportance(f"version {version}: expected sha256 {expected or 'missing'}, got {found}; {_REMEDY}")
    try:
        return NeuronImportance.from_bytes(blob)
    except ImportanceError as error:
        raise CorruptImportance(f"version {version} is unreadable: {error}; {_REMEDY}") from error


def metadata_from(version: str, meta: bytes | None) -> dict[str, object]:
    """Parse the metadata of a version.

    Raises:
        CorruptImportance: it is not JSON.
    """
    try:
        return dict(json.loads(meta or b""))
    except (ValueError, TypeError) as error:
        raise CorruptImportance(f"version {version} has unreadable metadata ({error}); {_REMEDY}") from error


_REMEDY = "activate another version or rank again"
