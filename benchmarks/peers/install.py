"""A virtual environment for each peer, which sees this interpreter's torch: ``python benchmarks/peers/install.py``."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from peers.systems import SYSTEMS, VENVS, python_of

VERSIONS = VENVS / "versions.json"
BORROW = "borrow-the-callers-packages.pth"
REPORTED = ("uvicorn", "uvloop", "fastapi", "starlette", "pydantic", "numpy", "torch")
PRINT_VERSIONS = """
import json, sys
from importlib.metadata import distributions
found = {d.name: d.version for d in reversed(list(distributions()))}
print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))
"""


@dataclass(frozen=True)
class Installed:
    """The versions that a system runs with; or, where it could not be installed, why."""

    versions: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


def install(system: str) -> Installed:
    """Make a system's environment, or bring it up to the newest releases that fit together."""
    try:
        if requirement := SYSTEMS[system].requirement:
            _install(system, requirement)
        return Installed(json.loads(_run(str(python_of(system)), "-c", PRINT_VERSIONS, system, *REPORTED)))
    except subprocess.CalledProcessError as error:
        command = " ".join(error.cmd)
        return Installed(problem=f"{command} ended with {error.returncode}: {error.stderr[-2000:]}")


def _install(system: str, requirement: str) -> None:
    environment, python = VENVS / system, python_of(system)
    if not python.exists():
        _run(sys.executable, "-m", "venv", str(environment))
    borrow = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages" / BORROW
    # Not while pip works: a system's dependencies are to be what pip finds for it alone.
    borrow.unlink(missing_ok=True)
    _run(str(python), "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager", requirement)
    # addsitedir appends, so what is installed here comes first; and it follows the caller's editable installs.
    borrow.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Install the systems named on the command line, or all; write and print what was installed."""
    VENVS.mkdir(exist_ok=True)
    known = json.loads(VERSIONS.read_text()) if VERSIONS.exists() else {}
    failed = []
    for system in sys.argv[1:] or SYSTEMS:
        installed = install(system)
        known[system] = installed.versions or {"problem": str(installed.problem)}
        failed += [system] if installed.problem else []
        print(f"{system}: {installed.problem or json.dumps(installed.versions)}", flush=True)
    VERSIONS.write_text(json.dumps(known, indent=1) + "\n")
    if failed:
        print(f"cannot be installed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
