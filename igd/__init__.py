"""The command line, ``igd``: a file for each command."""
