"""Where the embedded server keeps its files: directories that only we may enter."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from importance_store.errors import EmbeddedServerError

MAX_SOCKET_PATH_BYTES = 103  # macOS has room for 104 with the final zero, Linux for 108


def private_directory(path: Path) -> Path:
    """Make ``path`` a directory of ours with mode 0700.

    Raises:
        EmbeddedServerError: it is another user's, not a directory, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()  # not stat: a link would lead elsewhere
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise EmbeddedServerError(
                f"expected {path} to be a directory of user {os.geteuid()}, got one of user {found.st_uid} or a link; "
                "set another IGD_DATA_DIR"
            )
        path.chmod(0o700)
    except OSError as error:
        raise EmbeddedServerError(f"cannot use the directory {path} ({error}); set another IGD_DATA_DIR") from error
    return path


def socket_path(directory: Path) -> Path:
    """A socket path short enough for the kernel, the same for every process that uses ``directory``."""
    path = directory / "valkey.sock"
    if _fits(path):
        return path
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16] + ".sock"
    path = Path(tempfile.gettempdir()) / f"igd-{os.geteuid()}" / name
    if not _fits(path):
        raise EmbeddedServerError(f"the socket path {path} is too long; set a shorter IGD_DATA_DIR or TMPDIR")
    private_directory(path.parent)
    return path


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES
