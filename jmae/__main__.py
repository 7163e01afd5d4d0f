"""`python -m jmae COMMAND` is `jmae COMMAND`."""

from jmae.cli import run

run()
