"""`--matmul-precision`: in how many bits products of matrices and convolutions are made, where there is a choice."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.runs.configuration import PRECISION, PRECISIONS
from jaxtransfer.runs.directory import read_config


@contextlib.contextmanager
def multiplied(command: Any) -> Iterator[None]:
    """Runs a command in the precision that it asks for; evaluate and predict by default in that of their run.

    Raises:
      InputError: for an unknown precision.
    """
    options = getattr(command, "training", command)
    asked = getattr(options, PRECISION, None)
    if asked is not None and asked not in PRECISIONS:
        raise unknown("--matmul-precision", asked, PRECISIONS)
    if asked is None and options is command and hasattr(command, PRECISION):
        asked = _of_run(command.directory)
    with contextlib.nullcontext() if asked is None else jax.default_matmul_precision(asked):
        yield


def _of_run(directory: Any) -> str | None:
    """Returns the precision that a run was trained in; what is wrong with its configuration the command says itself."""
    try:
        noted = read_config(directory).get(PRECISION)
    except InputError:
        return None
    return noted if noted in PRECISIONS else None
