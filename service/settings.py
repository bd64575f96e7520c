"""Settings: ``IGD_*`` variables, and ``igd serve`` flags of the same names. Nothing else reads the environment."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import Forbidden

Positive = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """Everything that can be set. A flag wins over a variable, a variable over the default."""

    model_config = SettingsConfigDict(
        env_prefix="IGD_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        extra="ignore",
        allow_inf_nan=False,
    )

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 for any free one.")
    model: Path = Field(Path("models/fashion-mnist"), description="Model directory to serve.")
    redis_url: SecretStr | None = Field(
        None, description="redis://, rediss:// or unix:// URL of the store; unset, an embedded server in data_dir."
    )
    data_dir: Path = Field(Path(".igd"), description="Where the embedded store keeps its data.")
    history: int = Field(20, ge=1, description="Importance versions kept for roll-back.")
    admin_key: SecretStr | None = Field(None, description="Bearer key of the admin endpoints; unset, they are off.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Comma-separated Bearer keys of /classify; unset, it is open."
    )
    device: str = Field("auto", description="torch device; auto: cuda if there is one, else cpu.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the trunk; auto: bfloat16 where the hardware multiplies it."
    )
    compile: Literal["auto", "none", "inductor", "openvino"] = Field(
        "auto", description="What runs the model; auto: openvino on a CPU where it is installed, else none."
    )
    int8_first_pass: bool = Field(
        False, description="Compute the pseudo-label in int8 where that is quicker; needs OpenVINO and probe images."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; unset, one a physical core.")
    max_batch_size: Positive = Field(64, description="Images the model takes at once.")
    max_queue: Positive = Field(1024, description="Images admitted and not yet answered; more get 429.")
    max_wait_ms: float = Field(
        0.0, ge=0, description="Milliseconds a batch may wait to fill while the device is free; 0 suits most devices."
    )
    decode_threads: Positive = Field(2, description="Threads that decode images.")
    deadline_s: float = Field(30.0, gt=0, description="Seconds from a request's arrival to 504.")
    drain_s: float = Field(30.0, gt=0, description="Seconds to answer what was admitted after SIGTERM.")
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        description="Seconds of drain_s, half at most, to go on, not ready: what a load balancer needs to notice.",
    )
    max_images: Positive = Field(256, description="Images in one request.")
    max_body_mb: float = Field(32.0, gt=0, description="Megabytes in one request body.")
    max_total_mb: float = Field(512.0, gt=0, description="Megabytes in the bodies of all requests under way.")
    max_pixels: Positive = Field(
        50_000_000,
        le=178_956_970,  # where Pillow refuses by itself
        description="Pixels of one image, read from its header before decoding.",
    )
    datasets: Path | None = Field(None, description="TOML file of probe datasets that rankings may name.")
    worker: bool = Field(True, description="Run a ranking worker beside the server; with --no-worker, elsewhere.")
    worker_threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 1) // 2), ge=1, description="CPU threads of a ranking."
    )
    log_level: str = Field("info", pattern="^(?i:debug|info|warning|error)$", description="debug to error.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Of the log, on stderr; auto: text on a terminal, else JSON."
    )
    access_log: bool = Field(False, description="Log every request, not only failed and slow ones.")
    slow_request_s: float = Field(1.0, gt=0, description="Seconds from which a classification is slow.")

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return tuple(key.strip() for key in value.split(",") if key.strip()) if isinstance(value, str) else value

    @field_validator("admin_key", "redis_url", mode="after")
    @classmethod
    def _empty_is_unset(cls, value: SecretStr | None) -> SecretStr | None:
        # Compose files and shells pass unset variables on as empty strings.
        return value if value and value.get_secret_value() else None

    @model_validator(mode="after")
    def _leave_time_to_drain(self) -> Self:
        if self.drain_delay_s > self.drain_s / 2:
            raise ValueError(
                f"expected IGD_DRAIN_DELAY_S to be half of IGD_DRAIN_S ({self.drain_s:g}), of which it is a part, "
                f"at most, got {self.drain_delay_s:g}; raise IGD_DRAIN_S"
            )
        return self

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1_000_000)

    @property
    def exports_traces(self) -> bool:
        """Whether OpenTelemetry's own variables say where to send spans."""
        named = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))
        return named and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"

    def environment(self) -> dict[str, str]:
        """The environment for a process that is to have the same settings; secrets stay out of its command line."""
        own = {f"IGD_{name.upper()}": _as_text(value) for name, value in self if value is not None}
        others = {name: value for name, value in os.environ.items() if not name.upper().startswith("IGD_")}
        return others | own

    def export(self) -> None:
        """Give the processes that this one forks the same settings."""
        os.environ.update(self.environment())

    def required_admin_key(self) -> str:
        """The admin key.

        Raises:
            Forbidden: there is none, so the admin endpoints are off.
        """
        if self.admin_key is None:
            raise Forbidden("admin endpoints are off because IGD_ADMIN_KEY is not set; set it and restart the server")
        return self.admin_key.get_secret_value()


def _as_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return ",".join(map(_as_text, value)) if isinstance(value, tuple) else str(value)
