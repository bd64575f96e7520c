"""The systems that are compared: what pip installs for each, and the environment that its docs advise for throughput.

What the rest of each configuration comes from is said beside it, in ``serve_<system>.py``. All get one process with the
model, batches of at most 64, torch with the same number of threads, no access log, no metrics, no usage reports.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

VENVS = Path(__file__).parent.parent / ".venvs"


@dataclass(frozen=True)
class System:
    """A system: its requirement, or None for the caller's own environment; variables beside those that all get."""

    requirement: str | None
    environment: dict[str, str] = field(default_factory=dict)


SYSTEMS = {
    "fastapi": System(None),
    "litserve": System("litserve"),
    "bentoml": System("bentoml", {"BENTOML_DO_NOT_TRACK": "true", "BENTOML_HOME": str(VENVS / "bentoml" / "home")}),
    "ray": System(
        "ray[serve]",
        {
            # Both from "Performance Tuning" and "Enable High Throughput" in Ray's docs: a proxy in C before the replica
            # instead of one in Python, and requests that run in the loop that takes them. Together 5x here.
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    ),
    "mlserver": System("mlserver"),
}


def python_of(system: str) -> Path:
    """The interpreter that serves a system."""
    return VENVS / system / "bin" / "python" if SYSTEMS[system].requirement else Path(sys.executable)
