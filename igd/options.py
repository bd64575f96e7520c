"""Options that several commands share; unset, they come from the same ``IGD_*`` variables as the server's."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError

from service.settings import Settings

Model = Annotated[Path | None, typer.Option("--model", help="Model directory. [env: IGD_MODEL]")]
RedisUrl = Annotated[str | None, typer.Option("--redis-url", help="URL of the store. [env: IGD_REDIS_URL]")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Directory of the embedded store. [env: IGD_DATA_DIR]")
]


class NormName(StrEnum):
    """Of the perturbation."""

    LINF = "Linf"
    L2 = "L2"


T = TypeVar("T")
Epsilon = Annotated[float, typer.Option(min=0, help="Radius of the attack, in units of [0, 1] pixels.")]
Norm = Annotated[NormName, typer.Option(help="Of the perturbation.")]
TestData = Annotated[
    str, typer.Option(help="Test images: tar or folder of class folders, arrays, CIFAR's or MNIST's folder.")
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
    messages = [(e["loc"], e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"IGD_{str(where[0]).upper()}: {message}" if where else message for where, message in messages)


def items_of(text: str, kind: Callable[[str], T]) -> list[T]:
    """The parts between commas, each made by ``kind``; none of an empty text."""
    return [kind(item.strip()) for item in text.split(",") if item.strip()]


def named_files(options: list[str] | None) -> dict[str, Path]:
    """The files of repeated ``--importance NAME=FILE``, by name."""
    files = {}
    for text in options or []:
        name, _, file = text.partition("=")
        if not name or not file:
            raise typer.BadParameter(f"expected --importance NAME=FILE, got '{text}'")
        files[name] = Path(file)
    return files
