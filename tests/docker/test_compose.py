"""docker-compose.yml and its overrides."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

# What the image or the compose file sets, and the worker's own.
FIXED = {"IGD_HOST", "IGD_PORT", "IGD_MODEL", "IGD_DATA_DIR", "IGD_WORKER", "IGD_REDIS_URL", "IGD_ADMIN_KEY"}
SECRETS = {"IGD_ADMIN_KEY", "REDIS_PASSWORD", "GRAFANA_PASSWORD"}
# Ours: the others are not read by the service.
COMPOSE_ONLY = {"IGD_IMAGE", "IGD_IMAGE_CUDA", "IGD_MODEL_DIR", "IGD_PUBLISH", "IGD_SECRETS"}


@pytest.fixture(scope="module")
def compose(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


@pytest.mark.parametrize("override", [None, "docker-compose.gpu.yml", "docker-compose.model.yml"])
def test_docker_compose_accepts_it(docker_compose: list[str], repository: Path, override: str | None) -> None:
    files = ["-f", "docker-compose.yml", *(["-f", override] if override else [])]
    command = [*docker_compose, *files, "config", "--quiet"]
    environment = os.environ | {"IGD_MODEL_DIR": "./models/fashion-mnist"}
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_issue_s_parts_are_there(services: dict[str, Any]) -> None:
    assert set(services) == {"secrets", "redis", "service", "worker", "prometheus", "grafana"}
    assert services["service"]["command"] == ["serve", "--no-worker"]
    assert services["worker"]["command"] == ["worker"]


def test_containers_can_do_little(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_images_of_others_are_pinned_by_tag(services: dict[str, Any]) -> None:
    for name in ("redis", "prometheus", "grafana"):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+[\w.-]*", services[name]["image"]), services[name]["image"]


def test_redis_is_not_published_and_the_rest_on_this_machine_only(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"service", "prometheus", "grafana"}
    assert all(":-127.0.0.1:" in port for (port,) in published.values())
    assert services["redis"]["networks"] == ["store"]


def test_redis_has_a_password_and_keeps_what_it_acknowledged(services: dict[str, Any]) -> None:
    command = services["redis"]["command"]
    assert command[:2] == ["redis-server", "/run/igd/redis-auth.conf"]
    given = dict(zip(command[2::2], command[3::2], strict=True))
    assert (given["--appendonly"], given["--appendfsync"], given["--dir"]) == ("yes", "always", "/data")
    assert given["--maxmemory-policy"] == "noeviction"


def test_the_variables_are_settings(services: dict[str, Any], setting_names: set[str]) -> None:
    for name in ("service", "worker"):
        variables = {variable.removesuffix("_FILE") for variable in services[name]["environment"]}
        assert variables <= setting_names


def test_every_setting_can_be_set(services: dict[str, Any], setting_names: set[str]) -> None:
    passed_on = {*services["service"]["environment"], *services["worker"]["environment"]}
    missing = setting_names - FIXED - passed_on
    assert not missing, f"add {missing} to docker-compose.yml and .env.example"


def test_the_example_names_every_variable(compose: dict[str, Any], repository: Path) -> None:
    files = [path.read_text() for path in repository.glob("docker-compose*.yml")]
    interpolated = {name for text in files for name in re.findall(r"(?<!\$)\$\{(\w+)", text)}
    environments = [service.get("environment", {}) for service in compose["services"].values()]
    passed_on = {name for environment in environments for name, value in environment.items() if value is None}
    example = re.findall(r"^#(\w+)=", (repository / ".env.example").read_text(), re.MULTILINE)
    assert sorted(example) == sorted(interpolated | passed_on)


def test_the_example_s_variables_are_settings_or_compose_s_own(repository: Path, setting_names: set[str]) -> None:
    example = re.findall(r"^#(IGD_\w+)=", (repository / ".env.example").read_text(), re.MULTILINE)
    assert set(example) - setting_names == COMPOSE_ONLY


def test_no_secret_has_a_default(services: dict[str, Any], repository: Path) -> None:
    assert services["secrets"]["environment"] == dict.fromkeys(SECRETS)
    example = dict(re.findall(r"^#(\w+)=(.*)", (repository / ".env.example").read_text(), re.MULTILINE))
    assert {example[name] for name in SECRETS} == {""}
    grafana = services["grafana"]["environment"]
    assert grafana["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/igd/grafana-password"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in grafana


def test_the_secrets_reach_those_who_need_them_and_only_one_writes(services: dict[str, Any]) -> None:
    mounts = {name: [v for v in service.get("volumes", []) if ":/run/igd" in v] for name, service in services.items()}
    assert mounts.pop("secrets") == ["${IGD_SECRETS:-secrets}:/run/igd"]
    assert mounts.pop("prometheus") == []
    assert all(mount == ["${IGD_SECRETS:-secrets}:/run/igd:ro"] for mount in mounts.values())


def test_a_stop_leaves_time_to_answer_what_was_admitted(services: dict[str, Any]) -> None:
    assert int(services["service"]["stop_grace_period"].removesuffix("s")) > Settings().drain_s


def test_there_is_room_for_uploads(services: dict[str, Any]) -> None:
    (tmp,) = services["service"]["tmpfs"]
    assert int(re.fullmatch(r"/tmp:size=(\d+)m", tmp)[1]) > Settings().max_total_mb


def test_the_ports_are_the_image_s_and_prometheus_scrapes_it(services: dict[str, Any], repository: Path) -> None:
    port = re.search(r"IGD_PORT=(\d+)", (repository / "docker/Dockerfile").read_text())[1]
    assert services["service"]["ports"][0].endswith(f"}}:{port}")
    config = yaml.safe_load((repository / "docker/prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["ig-defense"]["static_configs"][0]["targets"] == [f"service:{port}"]


def test_the_gpu_override_changes_the_image_everywhere(services: dict[str, Any], repository: Path) -> None:
    gpu = yaml.safe_load((repository / "docker-compose.gpu.yml").read_text())["services"]
    ours = {name for name, service in services.items() if "build" in service}
    assert set(gpu) == ours
    assert {service["image"] for service in gpu.values()} == {"${IGD_IMAGE_CUDA:-ig-defense:cuda}"}
    assert gpu["service"]["environment"] == {"IGD_DEVICE": "cuda"}
