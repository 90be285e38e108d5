"""Where the variables of a model and its inputs lie while it runs over a data set: on a device, or over a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtransfer.devices import processes
from jaxtransfer.devices.placement import Placement
from jaxtransfer.devices.sharding import Rule
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model


class Inference:
    """A model in inference mode: variables and inputs where they lie, and the outputs inside of a program.

    Args:
      model: the model.
      mesh: the devices that batches are split over; None for the default one.
      shard: rules by which its variables are split over the axes of the mesh.

    Raises:
      InputError: for rules that are none, and for a mesh in one of several processes.
    """

    def __init__(self, model: Model, mesh: Mesh | None = None, shard: Mapping[str, Rule] | None = None):
        self._model = model
        self._placement = None if mesh is None and shard is None else Placement(mesh, "jit", shard)
        if self._placement is not None and processes.count() > 1:
            raise InputError(
                f"a mesh for features is one process's, and this is one of {processes.count()}: leave mesh and shard "
                f"out, or run the model in a process of its own"
            )

    def variables(self, variables: Any) -> Any:
        """Returns a model's variables, the frozen ones too, on the devices, each kind under the model's name.

        Raises:
          InputError: where the rules do not fit the parameters.
        """
        named = {kind: {self._model.name: values} for kind, values in self._model.complete(variables).items()}
        if self._placement is None:
            return jax.device_put(named)
        if self._placement.shards is None:
            return self._placement.whole(named)
        return jax.device_put(named, self._placement.shards.follow(named, named["params"], frozen=True))

    def inputs(self, inputs: Any) -> Any:
        """Returns a batch of inputs on the devices, its rows split over them.

        Raises:
          InputError: where the rows don't divide by the devices.
        """
        return inputs if self._placement is None else self._placement.batch({"inputs": inputs})["inputs"]

    def outputs(self, placed: Any, inputs: Any) -> Mapping[str, jax.Array]:
        """Returns the model's outputs, inside of a program.

        Args:
          placed: as `variables` gives it.
          inputs: of the model.
        """
        if self._placement is not None:
            placed = self._placement.read(placed, placed["params"], frozen=True)
        variables = {kind: values[self._model.name] for kind, values in placed.items()}
        return self._model.apply(variables, inputs, train=False, key=None)[0]
