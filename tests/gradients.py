"""Whether the compiled gradient of a loss is right: against differences and eagerly in float64, then in float32.

Not all compiled gradients are: XLA may compute a number again in another fusion, rounded otherwise, and what compares
it with its first self for equality (JAX's derivative of a maximum) is then wrong in silence, by any amount.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compilation

import jaxtransfer as jt

UNFUSED = {  # as eager, operation by operation, yet one program: the same to rounding, in a tenth of the time
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_disable_hlo_passes": "fusion",
}


def cast(tree, dtype):
    """Floating leaves in another type; keys and integers as they are."""

    def leaf(x):
        floating = not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) and np.issubdtype(x.dtype, np.floating)
        return np.asarray(x, dtype) if floating else x

    return jax.tree.map(leaf, tree)


def loss_of(objective, state, batch, key=None):
    """Returns the loss of a step as a function of the parameters, in their type, and of its frozen trees."""

    def loss(params, frozen=()):
        dtype = jax.tree.leaves(params)[0].dtype
        ctx = jt.Context(np.int32(0), key, dict(zip(objective.frozen, frozen, strict=False)))
        given = jax.tree.map(jnp.asarray, (cast(state, dtype), cast(batch, dtype)))
        return objective(params, *given, ctx)[0]

    return loss


def inner(one, other):
    return float(sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)))


def size(tree):
    return np.sqrt(inner(tree, tree))


def within(tree, pattern):
    """The tree with zeros outside of the paths that match."""
    flat = jt.tree.leaves_by_path(tree)
    kept = [np.asarray(leaf) * bool(re.search(pattern, path)) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), kept)


def close(got, want, rel):
    """The gradients of each leaf differ by `rel` of its size, or by 1e-5 of that of the whole (zeros but for noise)."""
    whole, want = size(want), jt.tree.leaves_by_path(want)
    for path, leaf in jt.tree.leaves_by_path(got).items():
        gap = np.linalg.norm(np.ravel(np.asarray(leaf, np.float64) - want[path]))
        assert gap <= rel * max(np.linalg.norm(np.ravel(want[path])), 1e-2 * whole), (path, gap, rel)


def filled(shapes, rng):
    """Parameters of these shapes: He-normal kernels, scales near 1, small biases; no program is compiled for them."""

    def leaf(path, like):
        noise = rng.normal(size=like.shape)
        if like.ndim > 1:
            return np.float32(noise * np.sqrt(2 / np.prod(like.shape[:-1])))
        return np.float32(0.1 * noise + (path[-1].key == "scale"))

    return jax.tree.map_with_path(leaf, shapes)


def assert_right(loss, params, *parts, single=None, differences=True, eager=False, unfused=False, h=1e-7):
    """The compiled gradient of `loss(params)` is right in all parameters, and in those of each part, a path pattern.

    Args:
      loss: of parameters of any type, in that type.
      params: in float32.
      parts: patterns of paths.
      single: the gradient in float32, where the caller has compiled it.
      differences: false where the loss depends on the parameters through what is not differentiated as well.
      eager: whether to compare with the gradient computed eagerly too, for which many small programs are compiled.
      unfused: whether to compare with the gradient computed operation by operation in one program.
      h: step of the differences.
    """
    assert not quick_compilation.is_on(), "mark the test optimised: only such a program can be wrong"
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        wide = cast(params, np.float64)
        run = jax.jit(jax.value_and_grad(loss))
        compiled = jax.tree.map(np.asarray, run(wide)[1])
        for part in ("", *parts) if differences else ():
            noise = within(jax.tree.map(lambda p: rng.normal(size=p.shape), wide), part)
            steepest = within(compiled, part)
            assert size(steepest) > 0, part
            direction = jax.tree.map(lambda s, n: s / size(steepest) + n / size(noise), steepest, noise)  # noqa: B023
            ahead, behind = (run(jax.tree.map(lambda p, d: p + step * d, wide, direction))[0] for step in (h, -h))  # noqa: B023
            difference = (float(ahead) - float(behind)) / (2 * h)
            assert inner(compiled, direction) == pytest.approx(difference, rel=1e-6), part
        if eager:
            close(compiled, jax.grad(loss)(wide), 1e-8)
        if unfused:
            close(compiled, jax.jit(jax.grad(loss), compiler_options=UNFUSED)(wide), 1e-8)
    single = jax.jit(jax.grad(loss))(cast(params, np.float32)) if single is None else single
    close(single, compiled, 1e-3)
