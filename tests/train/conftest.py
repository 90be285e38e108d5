import jax
import numpy as np
import pytest


@pytest.fixture
def mesh_of():
    """Makes a mesh as a user does: `mesh_of(4)` or, with two axes, `mesh_of(2, 2)`."""

    def make(*shape):
        names = ("data", "model")[: len(shape)]
        return jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])

    return make
