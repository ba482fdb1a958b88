"""The command line: a thin module a command, `flags` and `main`."""
