"""``igd``: serve, classify, rank, importance, evaluate, analyze, tune."""

import logging
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from defense import DefenseError
from igd import analyze, classify, evaluate, importance, rank, serve, tune, worker
from importance_store import StoreError
from service.errors import ServiceError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An image classifier under interpretability-guided test-time adversarial defense.",
)
app.command("serve", context_settings=serve.PASS_THROUGH, add_help_option=False)(serve.serve)
app.command("classify")(classify.classify)
app.command("rank")(rank.rank)
app.command("evaluate")(evaluate.evaluate)
app.command("analyze")(analyze.analyze)
app.command("tune")(tune.tune)
app.command("worker")(worker.worker)
app.add_typer(importance.app, name="importance")


def main() -> None:
    """Run a command; an error that we know is one sentence on stderr and exit code 1."""
    console = Console(stderr=True)
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    try:
        app()
    except (DefenseError, StoreError, ServiceError) as error:
        console.print(f"[red]igd:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
