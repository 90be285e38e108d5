"""Depthwise convolution: both formulations against loops, their derivatives against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import models
from jaxtransfer.models.depthwise import by_convolution, by_shifts, depthwise
from jaxtransfer.models.inverted_residual import relu6


def by_loops(x, kernel, stride, before, rows, columns):
    """Each output is a sum over its window; outside of the image there are zeros."""
    out = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for b, i, j, c in np.ndindex(out.shape):
        for k, m in np.ndindex(kernel.shape[:2]):
            row, column = i * stride + k - before[0], j * stride + m - before[1]
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                out[b, i, j, c] += x[b, row, column, c] * kernel[k, m, 0, c]
    return out


@pytest.mark.parametrize(
    ("size", "stride", "same", "before", "shape"),
    [
        (3, 1, True, (1, 1), (6, 5)),
        (3, 2, True, (0, 1), (3, 3)),  # of 6 rows TensorFlow pads behind alone, of 5 columns on both sides
        (3, 2, False, (1, 1), (3, 3)),
        (5, 2, True, (1, 2), (3, 3)),
        (5, 1, False, (2, 2), (6, 5)),
    ],
)
def test_against_loops(size, stride, same, before, shape, rng):
    x = rng.normal(size=(2, 6, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, 3)).astype(np.float32)
    wanted = by_loops(x.astype(np.float64), kernel, stride, before, *shape)
    np.testing.assert_allclose(depthwise(x, kernel, stride, same=same), wanted, rtol=1e-4, atol=1e-5)
    after = [(n - 1) * stride + size - side - b for n, side, b in zip(shape, x.shape[1:3], before, strict=True)]
    padding = list(zip(before, [max(0, a) for a in after], strict=True))
    weights = rng.normal(size=wanted.shape).astype(np.float32)

    def derivatives(form):
        return jax.jit(jax.grad(lambda x, k: jnp.sum(form(x, k, stride, padding) * weights), (0, 1)))(x, kernel)

    for ours, theirs in zip(derivatives(by_shifts), derivatives(by_convolution), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_relu6():
    x = jnp.array([-1.0, 0.0, 2.0, 6.0, 7.0, jnp.nan])
    np.testing.assert_array_equal(relu6(x), [0, 0, 2, 6, 6, np.nan])
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu6))(x[:5]), [0, 0, 1, 0, 0])


@pytest.mark.slow
def test_variants_grow():
    """Lite2 is wider; the first and last stage keep their blocks, the stem and the last convolution their width."""
    shapes = []
    for variant in (0, 2):
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        made = jax.eval_shape(models.efficientnet_lite(variant, 7).init, jax.random.key(0), image)["params"]
        shapes.append({name: jax.tree.map(jnp.shape, layer) for name, layer in made.items()})
    small, large = shapes
    assert len([name for name in small if name.startswith("stage")]) == 16
    assert len([name for name in large if name.startswith("stage")]) == 21
    assert small["stem_conv"] == large["stem_conv"]
    assert large["stage6_block1"]["project_conv"]["kernel"][-1] == 208
    assert "stage1_block2" not in large
    assert "stage7_block2" not in large
