"""The command line: typer commands and terminal views."""
