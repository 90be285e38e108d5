"""Losses of unlabelled predictions: how sure they are, how much classes are confused, how they are spread over them.

The losses in which examples meet, all but `entropy`, are scalars of the whole batch. Where each device of `pmap` or
`shard_map` has a part of it, `axis_name` tells over which axis: all get the value of the whole.
"""

import functools

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, check_strength, check_temperature, kept_rows, wide
from jaxtransfer.losses.blockwise import everywhere


def entropy(logits: jax.Array, *, temperature: float = 1.0, eps: float = 0.0) -> jax.Array:
    """Computes H(p) = −Σ_c p_c log p_c of p = softmax(logits / T) (Grandvalet & Bengio 2004, NeurIPS; TENT).

    Args:
      logits: float [..., C].
      temperature: T > 0.
      eps: what is added to p_c inside of the logarithm, −Σ_c p_c log(p_c + ε), as some released code does (1e-5 in
        SHOT and in the Transfer-Learning-Library); exact without.

    Returns:
      The entropy [...], in at least float32; finite, with a finite gradient, for any finite logits.

    Raises:
      InputError: for a temperature that isn't positive, and an ε that is negative.
    """
    check_temperature(temperature)
    check_strength(eps, "eps")
    (logits,) = wide(logits)
    return _entropy(_log_softmax(logits, temperature), eps)


def information_maximization(
    logits: jax.Array, *, eps: float = 1e-5, mask: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Computes (1/B) Σ_b H(p_b) − H(p̄), p̄ = (1/B) Σ_b p_b: sure of each example, spread over the classes.

    (SHOT: Liang et al. 2020, arXiv:2002.08546; RIM: Krause et al. 2010.) It is minus the mutual information of example
    and class. As released, each logarithm is of p + ε with ε = 1e-5; 0 makes it exact.

    Args:
      logits: float [B, C].
      eps: ε.
      mask: [B]; 0 leaves an example out, other values weigh it.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      A scalar, in at least float32; 0 where every example is left out.

    Raises:
      InputError: for what is no [B, C], and an ε that is negative.
    """
    check_strength(eps, "eps")
    logs, weights = _rows(logits, mask, axis_name)
    some = jnp.any(weights > 0)
    weights = jnp.where(some, weights, 1)
    share = weights / jnp.sum(weights)
    mean = jax.nn.logsumexp(logs, axis=0, b=share[:, None])
    return jnp.where(some, jnp.sum(_entropy(logs, eps) * share) - _entropy(mean, eps), 0)


def mcc(
    logits: jax.Array, *, temperature: float, mask: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Computes (1/C) Σ_j Σ_{i≠j} M_ij / Σ_i M_ij, M = Pᵀ diag(w) P: minimum class confusion (Jin et al. 2020).

    arXiv:1912.03699. P = softmax(logits / T), and w_b ∝ 1 + exp(−H(p_b)), of mean 1 and not differentiated, counts
    sure examples more. As released: M is divided by its row sums, which are differentiated, and the logarithm of the
    entropy is of p + 1e-5. As M is symmetric and rows of P sum to 1, this is 1 − (1/C) Σ_j Σ_b q_bj p_bj with
    q_bj = w_b p_bj / Σ_b w_b p_bj, a softmax over the batch: linear in C, and finite for a class that none gets.

    Args:
      logits: float [B, C].
      temperature: T > 0; the released script has 2.5.
      mask: [B]; 0 leaves an example out, other values weigh it.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      A scalar in [0, 1), in at least float32; 0 where every example is left out.

    Raises:
      InputError: for what is no [B, C], and a temperature that isn't positive.
    """
    check_temperature(temperature)
    logs, weights = _rows(logits, mask, axis_name, temperature)
    sure = jax.lax.stop_gradient(1 + jnp.exp(-_entropy(logs, 1e-5))) * weights
    some = sure > 0
    by_class = jnp.where(some[:, None], logs + jnp.log(jnp.where(some, sure, 1))[:, None], -jnp.inf)
    by_class = jnp.where(jnp.any(some), by_class, 0)
    within = jax.nn.softmax(by_class, axis=0) * jnp.exp(logs)
    return jnp.where(jnp.any(some), 1 - jnp.sum(within) / logs.shape[1], 0)


def bnm(logits: jax.Array, *, mask: jax.Array | None = None, axis_name: str | None = None) -> jax.Array:
    """Computes −‖P‖_* / B, P = softmax(logits): batch nuclear-norm maximisation (Cui et al. 2020, arXiv:2003.12237).

    The sum of the singular values of a batch's predictions is large where each is sure and classes are many. The
    gradient is that of least length, −U Vᵀ / B of the directions that P has: repeated singular values and zeros, as of
    equal rows or fewer examples than classes, do no harm.

    Args:
      logits: float [B, C].
      mask: [B]; 0 leaves an example out, of P and of B.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      A scalar, in at least float32; 0 where every example is left out.

    Raises:
      InputError: for what is no [B, C].
    """
    logs, weights = _rows(logits, mask, axis_name)
    keep = weights > 0
    share = jnp.where(keep[:, None], jnp.exp(logs), 0)
    return -nuclear_norm(share) / jnp.maximum(jnp.sum(keep), 1).astype(share.dtype)


def _rows(
    logits: jax.Array, mask: jax.Array | None, axis_name: str | None, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns log softmax [B, C] of the examples of all devices and their weights [B], both 0 where left out."""
    if logits.ndim != 2:
        raise InputError(f"logits must be [batch, classes]; got shape {logits.shape}")
    (logits,) = wide(logits)
    keep = kept_rows(mask, len(logits))
    weights = jnp.ones(len(logits), logits.dtype) if mask is None else jnp.where(keep, mask, 0).astype(logits.dtype)
    logits = jnp.where(keep[:, None], logits, 0)
    if axis_name is not None:
        logits, weights = everywhere((logits, weights), axis_name)
    return _log_softmax(logits, temperature), weights


def _log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    """Computes log softmax(logits / T), finite where logits are so far apart that their difference overflows."""
    return jnp.maximum(jax.nn.log_softmax(logits / temperature), jnp.finfo(logits.dtype).min / 4)


def _entropy(logs: jax.Array, eps: float) -> jax.Array:
    """Computes −Σ p log(p + ε) along the last axis, of log p."""
    share = jnp.exp(logs)
    within = logs if isinstance(eps, int | float) and eps == 0 else jnp.log(share + eps)
    return -jnp.sum(share * within, axis=-1)


@jax.custom_jvp
def nuclear_norm(matrix: jax.Array) -> jax.Array:
    """Computes the sum of the singular values of a matrix [M, N]; finite derivatives of both orders everywhere."""
    return jnp.sum(jnp.linalg.svd(matrix, full_matrices=False, compute_uv=False))


@nuclear_norm.defjvp
def _nuclear_norm_jvp(primals, tangents):
    return nuclear_norm(*primals), jnp.sum(_direction(*primals) * tangents[0])


@jax.custom_jvp
def _direction(matrix):
    """U Vᵀ of the singular values that aren't zero to rounding, whose bases are free to turn."""
    u, _, vt, some = _decomposed(matrix)
    return jnp.matmul(u * some[None], vt, precision=EXACT)


@_direction.defjvp
def _direction_jvp(primals, tangents):
    """Daleckii–Krein for singular values: the divided differences of σ ↦ [σ > 0], 2 / (σ + σ') of the odd part."""
    product = functools.partial(jnp.matmul, precision=EXACT)
    u, singular, vt, some = _decomposed(*primals)
    change = tangents[0]
    inner = product(product(u.T, change), vt.T)
    even, odd = (inner + inner.T) / 2, (inner - inner.T) / 2
    gap, total = singular[:, None] - singular[None], singular[:, None] + singular[None]
    differ = some[:, None] != some[None]
    any_of = (some[:, None] + some[None]) > 0
    between = jnp.where(differ, (some[:, None] - some[None]) / jnp.where(differ, gap, 1), 0)
    across = jnp.where(any_of, (some[:, None] + some[None]) / jnp.where(any_of, total, 1), 0)
    moved = product(product(u, between * even + across * odd), vt)
    inverse = jnp.where(some > 0, 1 / jnp.where(some > 0, singular, 1), 0)
    beside = product(change - product(u, product(u.T, change)), product(vt.T * inverse[None], vt))
    below = product(product(u * inverse[None], u.T), change - product(product(change, vt.T), vt))
    return _direction(*primals), moved + beside + below


def _decomposed(matrix):
    """Returns u, the singular values, vt, and which of them aren't 0 but for rounding, 1 or 0."""
    u, singular, vt = jnp.linalg.svd(matrix, full_matrices=False)
    least = jnp.finfo(matrix.dtype).eps * max(matrix.shape) * singular[0]
    some = (singular > least).astype(matrix.dtype)
    return u, singular * some, vt, some
