"""Settings: one name for a variable and its flag, bad values are named, secrets are kept."""

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from igd.options import describe
from service.errors import Forbidden
from service.settings import Settings

# For each setting a value that is not its default, as one writes it. A new setting needs a line here.
VALUES = {
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9", 9),
    "model": ("models/other", Path("models/other")),
    "redis_url": ("redis://h:1/0", SecretStr("redis://h:1/0")),
    "data_dir": ("/var/lib/igd", Path("/var/lib/igd")),
    "history": ("3", 3),
    "admin_key": ("sesame", SecretStr("sesame")),
    "api_keys": ("alpha, beta,", (SecretStr("alpha"), SecretStr("beta"))),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "compile": ("inductor", "inductor"),
    "int8_first_pass": ("true", True),
    "threads": ("3", 3),
    "max_batch_size": ("3", 3),
    "max_queue": ("3", 3),
    "max_wait_ms": ("1.5", 1.5),
    "decode_threads": ("3", 3),
    "deadline_s": ("1.5", 1.5),
    "drain_s": ("1.5", 1.5),
    "drain_delay_s": ("1.5", 1.5),
    "max_images": ("3", 3),
    "max_body_mb": ("1.5", 1.5),
    "max_total_mb": ("1.5", 1.5),
    "max_pixels": ("3", 3),
    "datasets": ("datasets.toml", Path("datasets.toml")),
    "worker": ("false", False),
    "worker_threads": ("7", 7),
    "log_level": ("debug", "debug"),
    "log_format": ("text", "text"),
    "access_log": ("true", True),
    "slow_request_s": ("2.5", 2.5),
}


def flags(name):
    text, value = VALUES[name]
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", text]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_a_variable_and_a_flag_of_the_same_name(name, monkeypatch):
    text, value = VALUES[name]
    assert getattr(Settings(), name) != value
    assert getattr(Settings(_cli_parse_args=flags(name)), name) == value

    monkeypatch.setenv(f"IGD_{name.upper()}", text)

    assert getattr(Settings(), name) == value
    assert getattr(Settings(_cli_parse_args=[]), name) == value


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default(monkeypatch):
    monkeypatch.setenv("IGD_PORT", "1")
    monkeypatch.setenv("IGD_MAX_QUEUE", "5")

    settings = Settings(_cli_parse_args=["--port", "2"])

    assert (settings.port, settings.max_queue, settings.max_images) == (2, 5, 256)


@pytest.mark.parametrize("name", ["redis_url", "admin_key", "api_keys"])
def test_an_empty_variable_is_an_unset_one(name, monkeypatch):
    # Compose files and shells pass unset variables on as empty strings.
    monkeypatch.setenv(f"IGD_{name.upper()}", "")

    assert not getattr(Settings(), name)


def test_without_an_admin_key_the_admin_endpoints_are_off():
    with pytest.raises(Forbidden, match="IGD_ADMIN_KEY"):
        Settings().required_admin_key()
    assert Settings(admin_key="sesame").required_admin_key() == "sesame"


def test_a_variable_of_something_else_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("IGD_OF_ANOTHER_PROGRAM", "x")

    assert Settings().port == 8000


BAD = [
    ("port", "many"),
    ("port", "-1"),
    ("port", "70000"),
    ("history", "0"),
    ("threads", "0"),
    ("max_batch_size", "0"),
    ("max_queue", "1.5"),
    ("decode_threads", "-2"),
    ("deadline_s", "0"),
    ("deadline_s", "nan"),
    ("drain_s", "inf"),
    ("max_total_mb", "inf"),
    ("drain_s", "-1"),
    ("max_images", "0"),
    ("max_body_mb", "0"),
    ("max_pixels", "179000000"),
    ("log_level", "chatty"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named(name, value, monkeypatch):
    with pytest.raises(ValidationError) as by_flag:
        Settings(_cli_parse_args=[f"--{name.replace('_', '-')}={value}"])

    monkeypatch.setenv(f"IGD_{name.upper()}", value)
    with pytest.raises(ValidationError) as by_variable:
        Settings()

    for caught in (by_flag, by_variable):
        assert describe(caught.value).startswith(f"IGD_{name.upper()}: ")


def test_the_delay_before_draining_leaves_time_to_drain():
    with pytest.raises(ValidationError) as caught:
        Settings(drain_delay_s=16, drain_s=30)
    assert describe(caught.value).startswith("expected IGD_DRAIN_DELAY_S to be half of IGD_DRAIN_S (30)")
    assert Settings(drain_delay_s=15, drain_s=30).drain_delay_s == 15


def test_a_bad_value_ends_the_server_with_its_name_and_no_secret(start_igd):
    igd = start_igd("serve", "--port", "many", IGD_MAX_QUEUE="0", IGD_ADMIN_KEY="sesame")

    assert igd.ended() == 2
    assert "IGD_PORT" in igd.output and "IGD_MAX_QUEUE" in igd.output
    assert "sesame" not in igd.output and "Traceback" not in igd.output


def test_an_unknown_flag_ends_the_server(start_igd):
    igd = start_igd("serve", "--prot", "8000")

    assert igd.ended() == 2
    assert "--prot" in igd.output and "Traceback" not in igd.output


def test_the_help_lists_every_flag(start_igd):
    igd = start_igd("serve", "--help")

    assert igd.ended() == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in igd.output
        assert " ".join(field.description.split()[:3]) in igd.output


def test_secrets_are_not_printed():
    settings = Settings(admin_key="sesame", api_keys="alpha,beta", redis_url="redis://:hunter2@host/0")

    for text in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert not any(secret in text for secret in ("sesame", "alpha", "beta", "hunter2")), text
