"""A mesh over what devices there are."""

import jax


def device_mesh() -> jax.sharding.Mesh | None:
    """Returns a mesh over all devices, its axis called `data`, or None where there is one device."""
    count = jax.device_count()
    return None if count == 1 else jax.make_mesh((count,), ("data",))
