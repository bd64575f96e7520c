"""Who may call what: Bearer keys, compared in constant time."""

import secrets
from collections.abc import Iterable
from typing import Annotated

from fastapi import Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from service.errors import InvalidKey
from service.runtime import runtime_of

_admin_key = HTTPBearer(auto_error=False, scheme_name="admin key", description="IGD_ADMIN_KEY")
_api_key = HTTPBearer(auto_error=False, scheme_name="API key", description="one of IGD_API_KEYS, if there are any")
Given = HTTPAuthorizationCredentials | None


def require_admin(request: Request, given: Annotated[Given, Security(_admin_key)]) -> None:
    """Let only the admin key pass.

    Raises:
        Forbidden: the admin endpoints are off. InvalidKey: no key, or a wrong one.
    """
    _require(given, [runtime_of(request).settings.required_admin_key()], "IGD_ADMIN_KEY")


def require_api_key(request: Request, given: Annotated[Given, Security(_api_key)]) -> None:
    """Let any of the API keys pass, and everybody where there are none.

    Raises:
        InvalidKey: no key, or a wrong one.
    """
    keys = [key.get_secret_value() for key in runtime_of(request).settings.api_keys]
    if keys:
        _require(given, keys, "one of IGD_API_KEYS")


def _require(given: Given, keys: Iterable[str], name: str) -> None:
    if given is None:
        raise InvalidKey(f"expected the header 'Authorization: Bearer KEY' with {name}, found none")
    # Every key is compared, so that the time does not tell which one came close.
    matches = [secrets.compare_digest(given.credentials.strip().encode(), key.encode()) for key in keys]
    if not any(matches):
        raise InvalidKey(f"the Bearer key is wrong; expected {name}")
