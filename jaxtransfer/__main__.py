"""`python -m jaxtransfer`."""

from jaxtransfer.cli import run

run()
