import jax
import numpy as np
import pytest


@pytest.fixture
def mesh_of():
    """Makes a mesh of so many devices."""
    return lambda count: jax.make_mesh((count,), ("data",), devices=jax.devices()[: int(np.prod(count))])
