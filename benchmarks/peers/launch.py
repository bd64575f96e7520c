"""Start a system, wait until it classifies, stop all of its processes. For Linux: it looks for them in /proc."""

import json
import os
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from peers.defended import PeerSettings
from peers.systems import SYSTEMS, VENVS, python_of

STOP_S = 5.0


class DidNotStart(RuntimeError):
    """A system ended, or never answered as it should; with the end of its log."""


@dataclass(frozen=True)
class Endpoint:
    """Where to post image files: the same for every system, but for the port."""

    url: str
    content_type: str = "image/png"


@contextmanager
def serving(
    system: str,
    model: Path,
    port: int,
    *,
    threads: int = 2,
    dtype: str = "auto",
    compiler: str = "auto",
    sample: Path | None = None,
    start_s: float = 120.0,
) -> Iterator[Endpoint]:
    """Serve a model directory with one of ``SYSTEMS``, until the block ends.

    Args:
        port: MLServer takes the next one, too; Ray takes 30000 and others.
        threads: of torch.
        dtype, compiler: of the predictor, which without a probe set takes float32 for "auto".
        sample: an image file to try it with; by default one of the model directory's samples.

    Raises:
        DidNotStart: it did not answer properly within ``start_s``.
    """
    sample = sample or min((model / "samples").glob("*.png"))
    endpoint = Endpoint(f"http://127.0.0.1:{port}/classify")
    log = VENVS / f"{system}.log"
    process = _start(system, PeerSettings(model, port, threads, dtype, compiler), log)
    try:
        _wait_until_it_classifies(process, endpoint, model, sample.read_bytes(), start_s)
        yield endpoint
    except DidNotStart as error:
        raise DidNotStart(f"{system}: {error}; {log} ends with:\n{log.read_text()[-2000:]}") from None
    finally:
        _stop(process)


def _start(system: str, settings: PeerSettings, log: Path) -> subprocess.Popen[bytes]:
    VENVS.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(VENVS.parent), os.environ.get("PYTHONPATH")]))
    # OpenMP threads that spin would take the processor from a system's other processes; our own server's sleep.
    openmp = {"OMP_NUM_THREADS": str(settings.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = os.environ | settings.environment() | openmp | {"PYTHONPATH": path} | SYSTEMS[system].environment
    command = [str(python_of(system)), "-m", f"peers.serve_{system}"]
    with log.open("w") as output:
        return subprocess.Popen(
            command, env=environment, cwd=VENVS, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait_until_it_classifies(
    process: subprocess.Popen[bytes], endpoint: Endpoint, model: Path, body: bytes, start_s: float
) -> None:
    give_up = time.monotonic() + start_s
    while process.poll() is None:
        try:
            return check_answer(post(endpoint, body), model)
        except (URLError, OSError, HTTPException) as error:
            if time.monotonic() > give_up:
                said = error.read()[:300] if isinstance(error, HTTPError) else ""
                raise DidNotStart(f"no answer within {start_s:g} s ({error} {said!r})") from error
        time.sleep(0.2)
    raise DidNotStart(f"it ended with {process.returncode}")


def post(endpoint: Endpoint, body: bytes) -> Any:
    """The JSON answer to one image file."""
    request = Request(endpoint.url, body, {"Content-Type": endpoint.content_type})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def check_answer(answer: Any, model: Path) -> None:
    """Make sure that it is a classification by this model.

    Raises:
        DidNotStart: it is none.
    """
    labels = tomllib.loads((model / "model.toml").read_text())["labels"]
    try:
        [prediction] = answer["predictions"]
        proper = labels[prediction["class_id"]] == prediction["label"] and 0 < prediction["probability"] <= 1
    except (LookupError, TypeError, ValueError):
        proper = False
    if not proper:
        raise DidNotStart(f"expected one prediction with a label of {model}, got {str(answer)[:300]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process group, then SIGKILL to what is left of all processes that came of it."""
    started = [process.pid, *descendants(process.pid)]  # now: an orphan can no longer be told from a stranger
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    give_up = time.monotonic() + STOP_S
    while (left := [pid for pid in started if _runs(pid)]) and time.monotonic() < give_up:
        process.poll()
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            children.setdefault(int(_stat(int(directory.name))[1]), []).append(int(directory.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def _runs(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """State, parent and so on; the process's name, which may have any characters, comes before them."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
