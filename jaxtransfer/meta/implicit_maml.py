"""Meta-learning by implicit differentiation: the derivative of an optimum, however it was reached."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.meta.inner_loop import inner_loop, widened
from jaxtransfer.meta.statistics import Statistics, refuse_per_step, transductive
from jaxtransfer.meta.tasks import episodes, init_on_support, mean_over_tasks, merge, select, task_context
from jaxtransfer.objective import Objective


def implicit_maml(
    objective: Objective,
    *,
    inner: optax.GradientTransformation,
    steps: int,
    strength: float,
    adapt: tree.Patterns = ".*",
    cg_steps: int = 5,
    damping: float = 0.0,
    statistics: Statistics = transductive,
    at_once: int | None = None,
) -> Objective:
    """Builds (1/T) Σ_t L(φ_t, query_t) with φ_t = argmin_φ L(φ, support_t) + (λ/2) ‖φ - θ‖², over any objective.

    Implicit MAML (Rajeswaran et al. 2019, arXiv:1909.04630). φ_t is what `steps` updates by `inner` make of θ; they
    are not differentiated, so that the memory does not grow with their number. The gradient is that of the optimum:
    with g = ∇L(φ_t, query_t), H = ∇²L(φ_t, support_t) and λ = `strength`, task t gives

        dL/dθ = (I + H/λ)⁻¹ g,

    by at most `cg_steps` steps of conjugate gradients, each with one Hessian-vector product. It is exact where the
    inner problem is solved, L has a curvature above -λ there, and conjugate gradients have converged.

    Where `adapt` leaves parameters ψ out, φ and θ above are the adapted ones alone. ψ acts on the query loss directly
    and through the optimum, and its gradient has both terms: ∂L(φ_t, query_t)/∂ψ - (∂²L(φ_t, support_t)/∂φ∂ψ)ᵀ
    (H + λI)⁻¹ g.

    A batch is one of episodes, as for `maml`. Metrics are those of the objective on the query sets after adaptation,
    and `implicit_maml`, the loss. What the objective draws (dropout) is drawn once for a task's inner problem.

    Args:
      objective: the loss of one task, twice differentiable; its frozen trees, penalties and weights work as anywhere.
      inner: any optax optimiser, whose state starts afresh in each task.
      steps: inner updates.
      strength: λ of the proximal term, above 0.
      adapt: path patterns of the parameters that the inner loop changes.
      cg_steps: most steps of conjugate gradients, which stop at a relative residual of the type's precision.
      damping: δ in ((1 + δ) I + H/λ)⁻¹, at least 0: keeps the system positive definite in curvature below -λ, for a
        biased gradient.
      statistics: `transductive` or `running`; see `jaxtransfer.meta.statistics`. The state is never changed.
      at_once: tasks that run together, by vmap, the rest following in a scan; all at once by default.

    Returns:
      An objective over episodes, with the parameters of `objective`.

    Raises:
      InputError: where `strength` is not above 0, `cg_steps` below 1 or `damping` below 0, and for `per_step`
        statistics; at init, where a pattern selects no parameter or the batch is no episode.
    """
    refuse_per_step(statistics, "implicit_maml")
    _check(strength, cg_steps, damping)

    def loss(outputs, params, state, batch, ctx):
        state_before = jax.lax.stop_gradient(state)  # what a term to the left has moved depends on the parameters

        def task(params, data, index):
            at_support = task_context(ctx, index, train=statistics.support_train)
            at_query = task_context(ctx, index, train=statistics.query_train)
            start = jax.tree.map(widened, select(params, adapt))
            others = {path: leaf for path, leaf in tree.leaves_by_path(params).items() if path not in start}
            handles = tuple(at_support.frozen)
            fixed = data["support"], state_before, at_support.step, at_support.key, tuple(at_support.frozen.values())

            def support_loss(fast, others, fixed):
                support, state, step, key, frozen = fixed
                at = dataclasses.replace(at_support, step=step, key=key, frozen=dict(zip(handles, frozen, strict=True)))
                return objective(merge(params, {**others, **fast}), state, support, at)[0]

            def solve(start, others, fixed):
                def proximal(fast, _):
                    value = support_loss(fast, others, fixed)
                    return value + 0.5 * strength * _square_distance(fast, start).astype(value.dtype)

                return inner_loop(proximal, start, optimizer=inner, steps=steps, first_order=True)[0]

            optimum = _optimum(solve, support_loss, strength=strength, cg_steps=cg_steps, damping=damping)
            fast = optimum(start, others, fixed)
            value, _, metrics = objective(merge(params, fast), state_before, data["query"], at_query)
            return value, metrics

        value, metrics = mean_over_tasks(task, params, episodes(batch), ctx, at_once=at_once)
        return value.value, state, {"implicit_maml": value, **metrics}

    def setup(key, batch):
        return init_on_support(objective, key, batch)

    return Objective("implicit_maml", (), loss, setup=setup, frozen=objective.frozen, models=objective.models)


def _optimum(solve: Callable, loss_fn: Callable, *, strength: float, cg_steps: int, damping: float) -> Callable:
    """Returns `solve(start, others, fixed)`, differentiable in `start` and `others` by the implicit function theorem.

    At φ = argmin L(φ, ψ, fixed) + (λ/2) ‖φ - θ‖² a cotangent v of φ becomes λw of θ and -(∂²L/∂φ∂ψ)ᵀw of ψ, where
    (H + λI) w = v; Hessian-vector products are forward over reverse.
    """

    def forward(start, others, fixed):
        fast = solve(start, others, fixed)
        return fast, (fast, others, fixed)

    def backward(kept, cotangent):
        fast, others, fixed = kept
        _, hessian = jax.linearize(lambda f: jax.grad(loss_fn)(f, others, fixed), fast)
        shift = strength * (1 + damping)

        def system(w):
            return jax.tree.map(lambda h, w: h + shift * w, hessian(w), w)

        precision = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(cotangent)), default=0.0)
        w, _ = jax.scipy.sparse.linalg.cg(system, cotangent, tol=precision, maxiter=cg_steps)
        _, mixed = jax.jvp(lambda f: jax.grad(loss_fn, argnums=1)(f, others, fixed), (fast,), (w,))
        return jax.tree.map(lambda w: strength * w, w), jax.tree.map(jnp.negative, mixed), None

    optimum = jax.custom_vjp(solve)
    optimum.defvjp(forward, backward)
    return optimum


def _check(strength: float, cg_steps: int, damping: float) -> None:
    if not strength > 0:
        raise InputError(f"strength of the proximal term must be above 0; got {strength}")
    if cg_steps < 1:
        raise InputError(f"cg_steps must be at least 1; got {cg_steps}")
    if not damping >= 0:
        raise InputError(f"damping must be at least 0; got {damping}")


def _square_distance(left: Any, right: Any) -> jax.Array:
    return sum((jnp.sum(jnp.square(left[path] - right[path])) for path in left), start=jnp.zeros(()))
