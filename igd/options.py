"""Options that several commands share; unset, they come from the same ``IGD_*`` variables as the server's."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from service.settings import Settings

Model = Annotated[Path | None, typer.Option("--model", help="Model directory. [env: IGD_MODEL]")]
RedisUrl = Annotated[str | None, typer.Option("--redis-url", help="URL of the store. [env: IGD_REDIS_URL]")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Directory of the embedded store. [env: IGD_DATA_DIR]")
]


def settings_of(model: Path | None = None, redis_url: str | None = None, data_dir: Path | None = None) -> Settings:
    """The server's settings, with what the command line says in their place."""
    given = {"model": model, "redis_url": redis_url, "data_dir": data_dir}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        raise typer.BadParameter(describe(error)) from error


def describe(error: ValidationError) -> str:
    """What is wrong with the settings, one sentence a setting."""
    return "; ".join(f"IGD_{str(e['loc'][0]).upper()}: {e['msg']}" if e["loc"] else e["msg"] for e in error.errors())
