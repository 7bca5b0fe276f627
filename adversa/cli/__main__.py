"""`python -m adversa.cli`: the command, where its script is not on the PATH."""

from adversa.cli.app import main

main()
