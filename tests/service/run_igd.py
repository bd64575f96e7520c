"""What a process forked for a test runs: ``igd``, with arguments, environment and output of its own.

Run by ``runpy.run_path`` with ``arguments``, ``environment``, ``output`` and ``before`` (code, run first) as globals.
"""

# ruff: noqa: F821
import os
import sys

log = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.dup2(log, 1)
os.dup2(log, 2)
os.environ.update(environment)
sys.argv = ["igd", *arguments]

from igd.cli import main  # noqa: E402

exec(before)
main()
