"""Checks of values that options may have, before anything is loaded."""

import math
from typing import Any

import jax

from jaxtransfer import models
from jaxtransfer.errors import InputError, unknown

MOST = 2**31 - 1
"""What a step or an index in 32 bits can be."""


def check_network(name: str) -> None:
    """Raises for a network that there isn't, and for one of texts, which commands don't train."""
    of_images = [known for known, row in models.ZOO.items() if not row.takes_text]
    if name in models.ZOO and name not in of_images:
        raise InputError(f"{name} takes the tokens of texts, and commands take images; train it from Python: jt.fit")
    if name not in of_images:
        raise unknown("model", name, of_images)


def divides_by_devices(name: str, value: int) -> None:
    """Raises for a number of rows that the devices can't share."""
    if value % (count := jax.device_count()):
        raise InputError(f"--{name.replace('_', '-')} must be a multiple of the {count} devices; got {value}")


def at_least(options: Any, least: float, *names: str) -> None:
    """Raises for an option that is set and smaller than `least`, not finite, or a count that no array can have."""
    for name in names:
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if isinstance(value, int) and value > MOST and name != "seed":
            raise InputError(f"{option} must be at most {MOST}; got {str(value)[:40]}")
        if value is not None and not (value >= least and math.isfinite(value)):
            raise InputError(f"{option} must be at least {least}; got {value}")


def at_most(options: Any, most: int, why: str, *names: str) -> None:
    """Raises for an option that is set and larger than `most`, and says why that is enough."""
    for name in names:
        if (value := getattr(options, name)) is not None and value > most:
            raise InputError(f"--{name.replace('_', '-')} must be at most {most}, {why}; got {value}")


def positive(options: Any, *names: str) -> None:
    """Raises for an option that is set and not positive, or not finite."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} must be positive and finite; got {value}")
