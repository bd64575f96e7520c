"""The command line, ``igd``: a file for each command."""

import os

# Before torch is imported. OpenMP threads that spin between operations lose their processor to whatever else runs, and
# an operation waits for the slowest of them: a ranking beside the server made requests fifty times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
