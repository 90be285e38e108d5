"""JAX's derivative of a maximum is wrong in compiled programs on CPU: ten lines of plain JAX, no jaxtransfer.

The derivative of `jnp.max` marks the place of the maximum by `x == maximum`. Inside a fusion XLA's CPU compiler
computes x anew, with fused multiply-adds where the maximum was taken of separately rounded products; the mark misses,
and that entry's gradient is lost. `jnp.maximum` compares likewise. Picked by a place that is stored as an integer
(`jaxtransfer.models.layers.max_pool`), by sorting or by `reduce_window`, the gradient is right.

    python -m experiments.max_gradient                                       # some seconds
    XLA_FLAGS=--xla_cpu_max_isa=AVX python -m experiments.max_gradient       # no fused multiply-add: all are right

jax 0.10.2 on an x86 CPU with FMA, derivative along a random direction, float64:

                   difference           eager        compiled    forward mode
    max          -1254.627131    -1254.627131    -1010.853667    -1324.441410
    place        -1254.627131    -1254.627131    -1254.627131    -1254.627131
    sort         -1254.627131    -1254.627131    -1254.627131    -1254.627131
    window       -1254.627131    -1254.627131    -1254.627131    -1254.627131

and with XLA_FLAGS=--xla_cpu_max_isa=AVX all are −1254.627131. On a GPU (H100, jax 0.11.2) all are, too, but for the
forward mode of `reduce_window`, which JAX computes in reduced precision there (−1254.627030).
"""

import jax
import jax.numpy as jnp
import numpy as np


def by_place(y):
    """The maximum over axis 1, picked by its place."""
    place = jnp.argmax(y, axis=1, keepdims=True)
    return jnp.sum(jnp.where(jnp.arange(y.shape[1])[None, :, None] == place, y, 0), axis=1)


MAXIMA = {
    "max": lambda y: jnp.max(y, axis=1),
    "place": by_place,
    "sort": lambda y: jnp.sort(y, axis=1)[:, -1],
    "window": lambda y: jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 4, 1), (1, 4, 1), "VALID")[:, 0],
}


def derivatives(maximum, h=1e-6):
    """Returns the derivative along a direction by differences, eager, compiled, and compiled in forward mode."""
    rng = np.random.default_rng(0)
    x, weights = jnp.asarray(rng.normal(size=(1024, 4, 8))), jnp.asarray(rng.normal(size=(1024, 8)))
    p, d = jnp.asarray(rng.normal(size=(2, 8))), jnp.asarray(rng.normal(size=(2, 8)))

    def f(p):
        y = jnp.sin(x * p[0][None, None]) * p[0][None, None] + p[1][None, None]
        return jnp.sum(weights * maximum(y) ** 2)

    along = jax.jit(lambda p: jax.jvp(f, (p,), (d,))[1])
    difference = (f(p + h * d) - f(p - h * d)) / (2 * h)
    found = difference, jnp.vdot(jax.grad(f)(p), d), jnp.vdot(jax.jit(jax.grad(f))(p), d), along(p)
    return [float(value) for value in found]


def main():
    """Prints the table."""
    print(f"jax {jax.__version__} on {jax.default_backend()}")
    print(" " * 8 + "".join(f"{name:>16}" for name in ("difference", "eager", "compiled", "forward mode")))
    with jax.enable_x64(True):
        for name, maximum in MAXIMA.items():
            print(f"{name:8}" + "".join(f"{value:16.6f}" for value in derivatives(maximum)))


if __name__ == "__main__":
    main()
