"""Small trees that look like networks, and what holds of all methods of fusion."""

import jax.numpy as jnp
import numpy as np

SHAPES = {"stem": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "head": {"kernel": (8, 3), "bias": (3,), "gain": ()}}


def network(seed, *, near=None, size=0.1, dtype=np.float32):
    """Returns variables of NumPy arrays; those `near` others differ from them by about `size`."""
    rng = np.random.default_rng(seed)

    def drawn(shape, start):
        value = rng.normal(size=shape)
        return np.asarray(value if start is None else np.asarray(start, np.float64) + size * value).astype(dtype)

    old = None if near is None else near["params"]
    params = {
        layer: {leaf: drawn(shape, None if old is None else old[layer][leaf]) for leaf, shape in leaves.items()}
        for layer, leaves in SHAPES.items()
    }
    mean, var = rng.normal(size=4).astype(np.float32), rng.uniform(0.1, 2, size=4).astype(np.float32)
    statistics = {"norm": {"mean": mean, "var": var, "count": np.asarray(seed, np.int32)}}
    return {"params": params, "batch_stats": statistics}


def flat(tree, prefix=""):
    """Returns the leaves by path."""
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}/{name}" if prefix else name).items()}


def assert_close(one, two, atol=1e-6):
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    for path in one:
        np.testing.assert_allclose(
            one[path].astype(np.float64), two[path].astype(np.float64), rtol=1e-6, atol=atol, err_msg=path
        )


def by_entry(models, base, of_leaf):
    """Returns a reference: `of_leaf(values [N, n], start [n]) -> [n]` in float64, parameter leaves alone."""
    out = {}
    for path, start in flat(base["params"]).items():
        values = np.array([flat(model["params"])[path].reshape(-1) for model in models], np.float64)
        out[path] = of_leaf(values, start.reshape(-1).astype(np.float64)).reshape(start.shape)
    return out


def assert_params(result, expected, atol=1e-6):
    found = flat(result["params"])
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-6, atol=atol, err_msg=path)


def as_jax(tree, dtype=None):
    if isinstance(tree, dict):
        return {name: as_jax(sub, dtype) for name, sub in tree.items()}
    floating = np.issubdtype(tree.dtype, np.floating)
    return jnp.asarray(tree, dtype if floating and dtype is not None else tree.dtype)
