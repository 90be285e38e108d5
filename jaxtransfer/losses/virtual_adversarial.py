"""Virtual adversarial training: predictions that stay where the inputs move in the direction that changes them most."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength, check_temperature, kept_rows, norm, wide


def vat(
    inputs: jax.Array,
    noise: jax.Array,
    *,
    forward: Callable[[jax.Array], jax.Array],
    radius: float = 8.0,
    iterations: int = 1,
    xi: float | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes KL(p(x) ‖ p(x + r)), r = ε g / ‖g‖ the direction that raises it most (Miyato et al. 2018).

    arXiv:1704.03976. g is found by power iteration with the Hessian of the divergence, from `noise` on. At r = 0 that
    is Jᵀ (diag p − p pᵀ) J, J the derivative of the logits, so that its product with d takes a forward and a backward
    derivative and no step length: the limit ξ → 0 of the released code, which takes the gradient at x + ξ d, with
    ξ = 1e-6, and is given here by `xi=1e-6`. In float32 so small a step is lost in the rounding of x. As released, the
    direction and p(x) are not differentiated; the defaults for ε and the iterations are those of the authors' code.

    Args:
      inputs: float [B, ...].
      noise: float [B, ...], what the iteration starts from; normal, drawn by the caller.
      forward: from inputs to logits [B, C]; where examples meet in it (batch norm), the gradient is of all of them.
      radius: ε > 0, the length of r over all but the first axis.
      iterations: how often; 1 is enough, the paper says.
      xi: ξ, the length of the step of finite differences; None for the limit.
      mask: [B]; 0 leaves an example out.

    Returns:
      The divergence [B], in at least float32; 0, with gradient 0, where the predictions don't depend on the input, and
      where left out.

    Raises:
      InputError: where the shapes do not fit, for inputs that aren't floating, and numbers out of range.
    """
    if inputs.shape != noise.shape or not inputs.ndim:
        raise InputError(f"inputs and noise must be [batch, ...] of one shape; got {inputs.shape} and {noise.shape}")
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise InputError(f"vat moves inputs a little, so they must be floating; got {inputs.dtype}")
    check_strength(radius, "radius")
    if iterations < 1:
        raise InputError(f"vat needs an iteration or more; got {iterations}")
    if xi is not None:
        check_temperature(xi, "xi")
    keep = kept_rows(mask, len(inputs))

    def logits_of(x):
        found = forward(x.astype(inputs.dtype))
        if found.ndim != 2 or len(found) != len(inputs):
            raise InputError(f"forward must give logits [batch, classes] of {len(inputs)} rows; got {found.shape}")
        return jnp.where(keep[:, None], *wide(found, jnp.zeros((), found.dtype)))

    (start,) = wide(inputs)
    direction, logits = _unit(wide(noise)[0]), jnp.zeros(())
    for _ in range(iterations):
        if xi is None:
            logits, slope = _curved(logits_of, start, direction)
        else:
            logits = logits_of(start)
            slope = jax.grad(lambda r, given: jnp.sum(_divergence(given, logits_of(start + r))))(xi * direction, logits)
        direction = _unit(jax.lax.stop_gradient(slope))
    moved = logits_of(start + radius * direction)
    return _divergence(jax.lax.stop_gradient(logits), moved)


def _curved(logits_of, start, direction):
    """Returns the logits, and the product of the Hessian of the divergence at 0 with a direction."""
    logits, change = jax.jvp(logits_of, (start,), (direction,))
    _, pull = jax.vjp(logits_of, start)
    share = jax.nn.softmax(logits)
    return logits, pull(share * (change - jnp.sum(share * change, axis=1, keepdims=True)))[0]


def _divergence(given: jax.Array, logits: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(given)
    return jnp.sum(jnp.exp(logs) * (logs - jax.nn.log_softmax(logits)), axis=1)


def _unit(x: jax.Array) -> jax.Array:
    """Divides each row of all axes but the first by its length, however small; zero stays zero."""
    rows = x.reshape(len(x), -1)
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1)
    length = norm(rows)
    return (rows / jnp.where(length > 0, length, 1)).reshape(x.shape)
