"""Load on a server: as much as it bears (wrk), or at a given rate whatever it bears (open loop)."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BATCH, LEAST_BATCHES, LONGEST = 64, 25, 5


@dataclass(frozen=True)
class Saturation:
    """What wrk saw. Latencies are of a closed loop: each connection waits for its answer before it sends again.

    To them wrk adds those of the requests that a connection would have sent meanwhile, had it not waited for longer
    than it does on average: at few connections a single stall can be the 99th percentile.

    Attributes:
        seconds: that it took. requests_per_s: answers with a 2xx or 3xx status.
        errors: other answers, and requests without one.
    """

    seconds: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    client_cpu_s: float


@dataclass(frozen=True)
class Offered:
    """What the open loop saw. Latencies are of ``ok`` answers, from when their request was due.

    Attributes:
        offered: requests that were due. rejected: answered 429 or 503.
        ok: answered 2xx. ok_in_time: those answered before the load ended.
        errors: other answers, and none within the time allowed.
        late_p99_ms: how late requests were sent, but for those ahead; where that is much, the client could not
            keep up, or all connections were taken.
    """

    offered: int
    ok: int
    ok_in_time: int
    rejected: int
    errors: int
    p50_ms: float
    p99_ms: float
    late_p99_ms: float
    client_cpu_s: float


def long_enough(seconds: float, images_per_s: float, batch: int = BATCH) -> float:
    """So many seconds, up to ``LONGEST`` times as many where enough batches take so long.

    Of a run, what is under way at its end does not count.
    """
    return min(LONGEST * seconds, max(seconds, LEAST_BATCHES * batch / max(1.0, images_per_s)))


def saturate(
    url: str,
    connections: int,
    seconds: float,
    *,
    bodies: Path,
    content_type: str = "image/png",
    threads: int = 1,
    timeout_s: float = 30.0,
) -> Saturation:
    """Post a directory's files over so many connections, each as fast as it is answered.

    Args:
        threads: of wrk.
        timeout_s: after which wrk counts a request as an error.
    """
    command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={timeout_s:g}s"]
    environment = {"BODIES": str(bodies), "CONTENT_TYPE": content_type}
    found, cpu_s = _measured([*command, "-s", str(HERE / "post.lua"), url], environment)
    ok = found["answers"] - found["not_ok"]
    errors = found["not_ok"] + found["lost"]
    return Saturation(found["seconds"], ok / found["seconds"], found["p50_ms"], found["p99_ms"], errors, cpu_s)


def offered(
    url: str,
    rate: float,
    seconds: float,
    *,
    bodies: Path,
    content_type: str = "image/png",
    seed: int = 0,
    connections: int = 512,
    timeout_s: float = 10.0,
    ahead: int = 0,
) -> Offered:
    """Post a directory's files at Poisson times, whether or not earlier ones are answered, in a process of its own.

    Args:
        rate: requests per second.
        connections: at most; a request that finds none free waits, and its latency counts that.
        timeout_s: how long after the last one was due to wait for answers.
        ahead: further requests that are due at the start, to fill the server's queue.
    """
    arguments = {"url": url, "rate": rate, "seconds": seconds, "bodies": str(bodies), "content_type": content_type}
    arguments |= {"seed": seed, "connections": connections, "timeout_s": timeout_s, "ahead": ahead}
    command = [sys.executable, "-m", "peers.open_loop", json.dumps(arguments)]
    found, cpu_s = _measured(command, {"PYTHONPATH": str(HERE.parent)})
    return Offered(**found, client_cpu_s=cpu_s)


def _measured(command: list[str], environment: dict[str, str]) -> tuple[dict[str, Any], float]:
    """The JSON in the last line that a command prints, and the CPU seconds that it took, its start included."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not lines:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}; it printed: {lines[-5:]}")
    return json.loads(lines[-1]), usage.ru_utime + usage.ru_stime
