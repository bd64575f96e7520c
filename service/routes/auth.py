"""Who may call what: Bearer keys, compared in constant time."""

import secrets
from collections.abc import Sequence
from typing import Annotated

from fastapi import Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.requests import Request

from service.errors import InvalidKey
from service.runtime import runtime_of

_admin_key = HTTPBearer(auto_error=False, scheme_name="admin key", description="IGD_ADMIN_KEY")
_api_key = HTTPBearer(auto_error=False, scheme_name="API key", description="one of IGD_API_KEYS, if there are any")
Given = HTTPAuthorizationCredentials | None


def require_admin(request: Request, documented: Annotated[Given, Security(_admin_key)]) -> None:
    """Let only the admin key pass.

    Raises:
        Forbidden: the admin endpoints are off. InvalidKey: no key, or a wrong one.
    """
    check_bearer(
        request.headers.get("authorization"), [runtime_of(request).settings.required_admin_key()], "IGD_ADMIN_KEY"
    )


def documents_api_key(documented: Annotated[Given, Security(_api_key)]) -> None:
    """Show in /docs that an endpoint takes an API key; it checks that itself with ``check_api_key``."""


def check_api_key(authorization: str | None, api_keys: Sequence[SecretStr]) -> None:
    """Let any of the API keys pass, and everybody where there are none.

    Raises:
        InvalidKey: no key, or a wrong one.
    """
    if api_keys:
        check_bearer(authorization, [key.get_secret_value() for key in api_keys], "one of IGD_API_KEYS")


def check_bearer(authorization: str | None, keys: Sequence[str], name: str) -> None:
    """Let any of ``keys`` pass.

    Raises:
        InvalidKey: no key, or a wrong one.
    """
    scheme, _, credentials = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not credentials:
        raise InvalidKey(f"expected the header 'Authorization: Bearer KEY' with {name}, found none")
    # Every key is compared, so that the time does not tell which one came close.
    matches = [secrets.compare_digest(credentials.strip().encode(), key.encode()) for key in keys]
    if not any(matches):
        raise InvalidKey(f"the Bearer key is wrong; expected {name}")
