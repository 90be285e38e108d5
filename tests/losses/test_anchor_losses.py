"""Quadratic penalties against sums over single scalars in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt


def a_tree(rng, dtype=jnp.float32, classes=3):
    shapes = {"body": {"kernel": (4, 5), "bias": (5,)}, "scale": (), "head": {"kernel": (5, classes)}}
    make = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {"model": jax.tree.map(make, shapes, is_leaf=lambda s: isinstance(s, tuple))}


def flat(tree, skip=()):
    """All scalars outside of the keys in `skip`, in double precision."""
    tree = {k: v for k, v in tree["model"].items() if k not in skip}
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("anchor_dtype", [jnp.float32, jnp.bfloat16])
def test_values(rng, dtype, anchor_dtype):
    w, w0, f = a_tree(rng, dtype), a_tree(rng, anchor_dtype), a_tree(rng)
    f = jax.tree.map(jnp.square, f)
    values = {
        "l2": (jt.losses.l2(w), 0.5 * sum(x * x for x in flat(w))),
        "l2_sp": (jt.losses.l2_sp(w, w0), 0.5 * sum((x - y) ** 2 for x, y in zip(flat(w), flat(w0), strict=True))),
        "fisher": (
            jt.losses.fisher_l2_sp(w, w0, f),
            0.5 * sum(z * (x - y) ** 2 for x, y, z in zip(flat(w), flat(w0), flat(f), strict=True)),
        ),
    }
    for name, (value, expected) in values.items():
        assert value.dtype == jnp.float32, name
        assert value.shape == ()
        assert float(value) == pytest.approx(expected, rel=1e-6), name


def test_double_precision_stays(rng, x64):
    w, w0, f = (a_tree(rng, jnp.float64) for _ in range(3))
    assert jt.losses.l2(w).dtype == jnp.float64
    difference = flat(w) - flat(w0)
    assert float(jt.losses.l2_sp(w, w0)) == pytest.approx(0.5 * (difference**2).sum(), rel=1e-13)
    assert float(jt.losses.fisher_l2_sp(w, w0, f)) == pytest.approx(0.5 * (flat(f) * difference**2).sum(), rel=1e-13)


def test_small_differences_survive_low_precision():
    w, w0 = {"w": jnp.full(3, 1.0078125, jnp.bfloat16)}, {"w": jnp.full(3, 1.0)}  # one unit in the last place
    assert float(jt.losses.l2_sp(w, w0)) == pytest.approx(1.5 * 0.0078125**2, rel=1e-6)


@pytest.mark.parametrize("exclude", ["head", ("head",), ("head", "scale"), "model/head/kernel", "he.*"])
def test_exclude(rng, exclude):
    w, w0, f = a_tree(rng, classes=3), a_tree(rng, classes=7), a_tree(rng, classes=2)
    skip = ("head", "scale") if "scale" in exclude else ("head",)
    difference = flat(w, skip) - flat(w0, skip)
    value = jt.losses.l2_sp(w, w0, exclude=exclude)
    assert float(value) == pytest.approx(0.5 * (difference**2).sum(), rel=1e-6)
    value = jt.losses.fisher_l2_sp(w, w0, f, exclude=exclude)
    assert float(value) == pytest.approx(0.5 * (flat(f, skip) * difference**2).sum(), rel=1e-6)
    del w0["model"]["head"], f["model"]["head"]  # nor need the anchor have it
    assert float(jt.losses.l2_sp(w, w0, exclude=exclude)) == pytest.approx(0.5 * (difference**2).sum(), rel=1e-6)


def test_gradients_by_formula(rng):
    w, w0, f = a_tree(rng), a_tree(rng), a_tree(rng)
    np.testing.assert_allclose(flat(jax.grad(jt.losses.l2)(w)), flat(w), rtol=1e-6)
    np.testing.assert_allclose(flat(jax.grad(jt.losses.l2_sp)(w, w0)), flat(w) - flat(w0), rtol=1e-6, atol=1e-7)
    expected = flat(f) * (flat(w) - flat(w0))
    np.testing.assert_allclose(flat(jax.grad(jt.losses.fisher_l2_sp)(w, w0, f)), expected, rtol=1e-5, atol=1e-7)


def test_zero_at_the_anchor(rng):
    w = a_tree(rng)
    assert float(jt.losses.l2_sp(w, w)) == 0
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(jax.grad(jt.losses.l2_sp)(w, w)))
    assert float(jt.losses.l2({})) == 0


def test_what_does_not_fit_is_listed(rng):
    w, w0 = a_tree(rng, classes=3), a_tree(rng, classes=7)
    with pytest.raises(jt.InputError, match=r"model/head/kernel: expected \(5, 3\), got \(5, 7\).*exclude"):
        jt.losses.l2_sp(w, w0)
    del w0["model"]["head"]
    with pytest.raises(jt.InputError, match=r"- model/head/kernel \(5, 3\)"):
        jt.losses.l2_sp(w, w0)
    with pytest.raises(jt.InputError, match=r"\+ model/head/kernel \(5, 3\)"):
        jt.losses.l2_sp(w0, w)
    with pytest.raises(jt.InputError, match="'tail' selects no parameter"):
        jt.losses.l2_sp(w, w, exclude="tail")
    with pytest.raises(jt.InputError, match="- model/head/kernel"):
        jt.losses.fisher_l2_sp(w, w, w0)
