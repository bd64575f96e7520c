"""The progress bar of long commands, on stderr: what is under way, how far it is, when it will be done."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def console_of(process: int = 0) -> Console:
    """Stderr, for the first of several processes; the others are silent."""
    return Console(stderr=True, quiet=process != 0)


def progress_bar(console: Console | None = None) -> Progress:
    """To be used as a context; tasks are shown by their description."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console or console_of())
