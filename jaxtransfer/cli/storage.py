"""Options of the types that networks compute in and store weights in, and how an optimiser moves those of few bits."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import optax
import tyro

import jaxtransfer as jt
from jaxtransfer.errors import InputError, unknown

STORED = ("float32", "bfloat16")
_ROUNDING = 0x726F756E  # so that rounding draws by another key than all else of a run


@dataclasses.dataclass(frozen=True)
class StorageOptions:
    """In which type weights are stored."""

    param_dtype: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: float32, or the source's)")
    ] = None
    """Type in which weights are stored: bfloat16, beside a copy in float32 that the optimiser moves, as many a step is
    less than bfloat16 can add."""
    stochastic_rounding: bool = False
    """With --param-dtype bfloat16: keep no copy, but round each update up or down at random, right on average."""

    def check(self) -> None:
        """Raises for a type that weights are not stored in."""
        if self.param_dtype is not None and self.param_dtype not in STORED:
            raise unknown("--param-dtype", self.param_dtype, STORED)

    def check_rounding(self, model_options: Mapping[str, Any]) -> None:
        """Raises where weights that are stored whole are to be rounded.

        Args:
          model_options: of the network.
        """
        if self.stochastic_rounding and model_options.get("param_dtype") != "bfloat16":
            raise InputError("--stochastic-rounding is for weights in bfloat16: add --param-dtype bfloat16")

    def model_options(self) -> dict[str, Any]:
        """Returns the entry of a run's configuration that makes a new network so; none for one in float32."""
        options = {} if self.param_dtype in (None, STORED[0]) else {"param_dtype": self.param_dtype}
        self.check_rounding(options)
        return {"model_options": options} if options else {}

    def model_options_over(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns that entry for a network that weights are there for: their type stays where none is asked for.

        Args:
          config: of the network; of a new one it has no such entry.
        """
        given = config.get("model_options") or {}
        if self.param_dtype is None:
            self.check_rounding(given)
            return {}
        options = {name: value for name, value in given.items() if name != "param_dtype"} | (
            self.model_options().get("model_options", {})
        )
        return {"model_options": options} if given or options else {}

    def mover(self, optimizer: optax.GradientTransformation, config: Mapping[str, Any]) -> optax.GradientTransformation:
        """Returns the optimiser, for weights in bfloat16 with copies of them or rounding at random.

        Args:
          optimizer: makes the updates.
          config: of the run: its network and its seed.
        """
        if (config.get("model_options") or {}).get("param_dtype") != "bfloat16":
            return optimizer
        if not self.stochastic_rounding:
            return jt.optim.master_weights(optimizer)
        return jt.optim.stochastic_rounding(optimizer, jax.random.fold_in(jax.random.key(config["seed"]), _ROUNDING))


@dataclasses.dataclass(frozen=True)
class PrecisionOptions(StorageOptions):
    """In which types the network computes, and its weights are stored."""

    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: float32)")] = None
    """bfloat16 computes the encoders in half the memory; weights, statistics, losses, and products of the tasks'
    gradients stay float32."""

    def check(self) -> None:
        """Raises for a type that nothing is computed in, or stored."""
        if self.dtype is not None and self.dtype not in STORED:
            raise unknown("--dtype", self.dtype, STORED)
        super().check()

    def model_options(self) -> dict[str, Any]:
        """Returns the entry of a run's configuration that makes a new network so; none for one in float32."""
        found = super().model_options()
        if self.dtype in (None, STORED[0]):
            return found
        return {"model_options": {"dtype": self.dtype, **found.get("model_options", {})}}
