"""Losses whose batch is split over devices that have a program each: the whole batch's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxtransfer as jt

B, D, DEVICES = 8, 3, 4
LABELS, MASK = jnp.array([0, 1, 0, 2, 1, 0, 3, 1]), jnp.array([1, 1, 0, 1, 1, 1, 1, 1])
L = jt.losses
LOSSES = {
    "info_nce": lambda a, b, y, m, t, n: L.info_nce(a, b, temperature=t, mask=m, axis_name=n),
    "info_nce both ways": lambda a, b, y, m, t, n: L.info_nce(a, b, temperature=t, symmetric=True, mask=m, axis_name=n),
    "nt_xent": lambda a, b, y, m, t, n: L.nt_xent(a, b, temperature=t, mask=m, axis_name=n),
    "dcl": lambda a, b, y, m, t, n: L.dcl(a, b, temperature=t, sigma=0.7, mask=m, axis_name=n),
    "supcon": lambda a, b, y, m, t, n: L.supcon(jnp.stack([a, b], 1), y, temperature=t, mask=m, axis_name=n),
    "supcon inside": lambda a, b, y, m, t, n: L.supcon(a, y, temperature=t, inside=True, mask=m, axis_name=n),
    "siglip": lambda a, b, y, m, t, n: L.siglip(a, b, temperature=t, bias=-2.0, mask=m, axis_name=n),
}


def all_of_them(params, sides, labels, mask, name):
    """The sum of the means of all losses, whose weights tell them apart, and their values [B] by name."""
    sides = [side @ params["kernel"] for side in sides]
    values = {k: loss(*sides, labels, mask, params["temperature"], name) for k, loss in LOSSES.items()}
    return sum(weight * jnp.mean(value) for weight, value in enumerate(values.values(), 1)), values


@pytest.fixture
def given(rng):
    sides = tuple(jnp.asarray(rng.normal(size=(B, D)), jnp.float32) for _ in range(2))
    params = {"kernel": jnp.asarray(rng.normal(size=(D, D)), jnp.float32), "temperature": jnp.float32(0.4)}
    return params, sides, LABELS, MASK


def compare(given, values, slopes):
    whole = jax.jit(jax.value_and_grad(all_of_them, has_aux=True), static_argnums=4)
    (_, expected), expected_slopes = whole(*given, None)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name].reshape(B), value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, slope in expected_slopes.items():
        np.testing.assert_allclose(slopes[name], slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max(), err_msg=name)


@pytest.mark.slow  # objectives do so in their tests, too
def test_pmap(given):
    def run(params, *rows):
        (_, values), slopes = jax.value_and_grad(all_of_them, has_aux=True)(params, *rows, "devices")
        return values, jax.lax.pmean(slopes, "devices")

    params, *rows = given
    rows = jax.tree.map(lambda x: x.reshape(DEVICES, B // DEVICES, *x.shape[1:]), rows)
    devices = jax.devices()[:DEVICES]
    mapped = jax.pmap(run, axis_name="devices", in_axes=(None, 0, 0, 0), devices=devices)
    values, slopes = mapped(params, *rows)
    compare(given, values, jax.tree.map(lambda x: x[0], slopes))


@pytest.mark.slow
def test_shard_map(given):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))

    def run(params, *rows):
        value, values = all_of_them(params, *rows, "devices")
        return jax.lax.pmean(value, "devices"), values

    specs = PartitionSpec(), PartitionSpec("devices")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs[0], *specs[1:] * 3), out_specs=specs)
    (_, values), slopes = jax.jit(jax.value_and_grad(mapped, has_aux=True))(*given)
    compare(given, values, slopes)
