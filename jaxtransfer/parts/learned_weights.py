"""Weights that are learned with the losses that they weigh: by uncertainty."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LearnedWeights:
    """Numbers s_k by which losses L_k become e^(−s_k) L_k + s_k, least for s_k = log L_k.

    A plain learned weight would fall to zero; here the bill is s_k. (Kendall et al. 2018, arXiv:1705.07115, in the form
    with one s for each loss whatever its likelihood, twice that of ½ e^(−s) L + ½ s.)

    Attributes:
      name: under which they are among the parameters.
      count: of losses.
    """

    name: str
    count: int

    def fresh(self, start: float = 0.0) -> dict[str, Any]:
        """Returns the first parameters: with s = 0 all weights are 1."""
        return {self.name: {"log_variance": jnp.full(self.count, start)}}

    def of(self, params: Any, number: int) -> tuple[jax.Array, jax.Array]:
        """Returns the weight e^(−s_k) of a loss, and its bill s_k."""
        bill = params[self.name]["log_variance"][number]
        return jnp.exp(-bill), bill
