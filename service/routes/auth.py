"""Who may call what: Bearer keys, compared in constant time."""

import secrets
from collections.abc import Iterable

from starlette.requests import Request

from service.errors import InvalidKey
from service.runtime import runtime_of


def require_admin(request: Request) -> None:
    """Let only the admin key pass.

    Raises:
        Forbidden: the admin endpoints are off. InvalidKey: no key, or a wrong one.
    """
    _require(request, [runtime_of(request).settings.required_admin_key()], "IGD_ADMIN_KEY")


def require_api_key(request: Request) -> None:
    """Let any of the API keys pass, and everybody where there are none.

    Raises:
        InvalidKey: no key, or a wrong one.
    """
    keys = [key.get_secret_value() for key in runtime_of(request).settings.api_keys]
    if keys:
        _require(request, keys, "one of IGD_API_KEYS")


def _require(request: Request, keys: Iterable[str], name: str) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidKey(f"expected the header 'Authorization: Bearer KEY' with {name}, found none")
    # Every key is compared, so that the time does not tell which one came close.
    matches = [secrets.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if not any(matches):
        raise InvalidKey(f"the Bearer key is wrong; expected {name}")
