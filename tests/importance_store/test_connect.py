"""Connecting to a Redis of one's own: what is refused, and that no password is told."""

import time
import traceback
from pathlib import Path

import pytest

from importance_store import StoreAuthenticationError, StoreError, StoreUnavailable, open_store


def connect(url):
    return open_store(redis_url=url, data_dir=Path("unused"), model="toy")


def with_credentials(server, credentials):
    return server.url.replace("://", f"://{credentials}@")


def add_user(server, name, *rules):
    with connect(server.url) as admin, admin.new_client() as client:
        client.execute_command("ACL", "SETUSER", name, "on", ">pw", *rules)


def test_a_server_that_is_not_there_is_reported_at_once():
    started = time.monotonic()

    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1 does not answer .* IGD_REDIS_URL"):
        connect("redis://:secret@127.0.0.1:1/0")

    assert time.monotonic() - started < 5  # takes about 0.4 s


@pytest.mark.parametrize("credentials", ["", ":guess", "nobody:guess"])
def test_a_wrong_password_is_reported_and_not_repeated(start_redis, caplog, credentials):
    server = start_redis("--requirepass", "secret")

    with pytest.raises(StoreAuthenticationError, match=r"refused us .* check user and password") as caught:
        connect(with_credentials(server, credentials) if credentials else server.url)

    assert "guess" not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_the_right_password_lets_in(start_redis, make_importance, until):
    server, changes = start_redis("--requirepass", "s3cr/t"), []

    with connect(with_credentials(server, ":s3cr%2Ft")) as store:
        version = store.publish(make_importance())
        with store.watch(on_change=changes.append):
            until(lambda: changes == [version])


@pytest.mark.parametrize(
    "url", ["redis://:pa/ss@host:6379", "redis://:12#ss@host", "redis://:12?ss@host", "http://:pass@host", "pass"]
)
def test_an_unusable_url_is_refused_without_quoting_it(url):
    with pytest.raises(StoreError, match="percent-encode") as caught:
        connect(url)

    told = "".join(traceback.format_exception(caught.value))
    assert "ss@" not in told and "'pa'" not in told and ":12" not in told


def test_the_documented_acl_suffices(redis_server, make_importance, until):
    add_user(redis_server, "igd", "~igd:*", "~rq:*", "&*", "+@all", "-@admin", "-@dangerous")
    changes = []

    with connect(with_credentials(redis_server, "igd:pw")) as store:
        older, newer = store.publish(make_importance(1)), store.publish(make_importance(2))
        store.activate(older, expected_active=newer)
        with store.watch(on_change=changes.append):
            until(lambda: changes == [older])
        assert [version.version for version in store.versions()] == [newer, older]


def test_a_user_who_may_only_read_is_told_so(redis_server, make_importance):
    add_user(redis_server, "reader", "~*", "+@read", "+@connection")

    with connect(with_credentials(redis_server, "reader:pw")) as store:
        assert store.active_version() is None
        with pytest.raises(StoreAuthenticationError, match="ACL"):
            store.publish(make_importance())
