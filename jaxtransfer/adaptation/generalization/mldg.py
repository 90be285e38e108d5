"""Meta-learning over domains: what is learned from some source domains is to help in the others."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.adaptation.generalization.sources import check_domains
from jaxtransfer.errors import InputError
from jaxtransfer.meta.inner_loop import inner_loop
from jaxtransfer.meta.tasks import inner_context, merge, select
from jaxtransfer.objective import Batch, Mean, Objective, view_of


def mldg(
    objective: Objective,
    *,
    domains: Sequence[str],
    inner: optax.GradientTransformation,
    test_domains: int = 1,
    beta: float = 1.0,
    steps: int = 1,
    first_order: bool = False,
    adapt: tree.Patterns = ".*",
) -> Objective:
    """Builds F(θ) + β G(θ'), θ' = θ adapted to F by an inner update; F the loss on most sources, G on the others.

    (MLDG: Li et al. 2018, arXiv:1710.03463.) In each step some of the source domains are drawn to be the meta-test
    ones, the same on all devices; the others are the meta-train ones. F is the mean loss over the examples of the
    latter, and G, by the machinery of `jt.maml`, that over the former after the inner update, whose gradient is that of
    the global batch. It is the whole loss, of any objective of one domain, the cross-entropies included:

        objective = jt.adaptation.mldg(jt.classification(model), domains=names, inner=optax.sgd(1e-3))

    Domains of a step run as one batch, so that batch norm sees all of its part; its running statistics follow those of
    F. DomainBed's form is `first_order=True`, with `optax.adam` at the learning rate as the inner optimiser, and all
    pairs of a meta-train and a meta-test domain. In evaluation the last domains of `domains` are the meta-train ones.

    Args:
      objective: the loss of one domain, on a batch {"image", "label"}, say.
      domains: the entries of the batch that hold the domains' batches, of one number of rows, two or more.
      inner: any optax optimiser, whose state starts afresh in each step.
      test_domains: how many of the domains are meta-test ones, at least one, and fewer than there are.
      beta: β ≥ 0.
      steps: inner updates.
      first_order: leave out second derivatives.
      adapt: path patterns of the parameters that the inner update changes.

    Returns:
      An objective with the metrics of `objective` on the meta-train domains, `mldg`, the loss, and `mldg/meta_test`, G.

    Raises:
      InputError: for numbers of domains out of range, a negative β, and an objective with averages or queues; at init,
        for domains that aren't there or differ in their number of rows.
    """
    names = check_domains(domains)
    if not 1 <= test_domains < len(names):
        raise InputError(f"test_domains must be in [1, {len(names) - 1}], of {len(names)} domains; got {test_domains}")
    if steps < 1 or not 0 <= beta < float("inf"):
        raise InputError(f"mldg needs steps >= 1 and a finite beta >= 0; got steps={steps}, beta={beta}")
    if objective.per_update:
        raise InputError(
            f"the objective keeps {objective.per_update[0]!r}, which moves once per update, but it runs twice in mldg: "
            f"an average goes beside it, mldg(...) + jt.averaged(model)"
        )

    def setup(key, batch):
        return objective.init(key, _part(batch, names[0]))

    def loss(outputs, params, state, batch, ctx):
        key = ctx.shared_key("mldg")
        order = jnp.arange(len(names)) if key is None else jax.random.permutation(key, len(names))
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows, axis=1), *(_part(batch, name) for name in names))
        test, train = (_chosen(stacked, part) for part in (order[:test_domains], order[test_domains:]))

        def value_of(fast, state, part, own):
            if ctx.axis is not None:  # a no-op whose derivative is the mean over the devices: the global gradient
                fast = jax.lax.pmean(fast, ctx.axis)
            return objective(merge(params, fast), state, part, own)

        def inner_loss(fast, number):
            value, new, metrics = value_of(fast, state, train, inner_context(ctx, number))
            return value, (value, new, metrics)

        start = select(params, adapt)
        found = inner_loop(
            inner_loss, start, optimizer=inner, steps=steps, first_order=first_order, has_aux=True
        )  # the first update's loss is F(θ) itself
        adapted, (_, seen) = found
        first, new, metrics = jax.tree.map(lambda leaf: leaf[0], seen)
        second, _, _ = value_of(adapted, state, test, inner_context(ctx, jnp.asarray(steps)))
        value = first + jnp.asarray(beta).astype(first.dtype) * second
        one = jnp.ones_like(value)
        told = {"mldg": Mean(value, one), "mldg/meta_test": Mean(second, one)}
        return value, new if ctx.train else state, {**metrics, **jax.lax.stop_gradient(told)}

    def check(outputs, batch):
        sizes = {name: {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(_part(batch, name))} for name in names}
        if len(set.union(*sizes.values())) > 1:
            told = ", ".join(f"{name} {sorted(size)[0][0]}" for name, size in sizes.items())
            raise InputError(f"mldg: domains take turns, so their batches must have one number of rows; got {told}")

    return Objective("mldg", (), loss, setup=setup, check=check, frozen=objective.frozen, models=objective.models)


def _part(batch: Batch, name: str) -> Batch:
    part = view_of(batch, (name,))
    if not hasattr(part, "keys"):
        raise InputError(f"batch[{name!r}] must be a domain's batch of its own, a dict; got a {type(part).__name__}")
    return part


def _chosen(stacked: Batch, order: jax.Array) -> Batch:
    """Returns the rows of some domains, of leaves [B, S, ...], as one batch in which no row changes its device."""

    def rows(leaf):
        taken = jnp.take(leaf, order, axis=1)
        return taken.reshape(-1, *taken.shape[2:])

    return jax.tree.map(rows, stacked)
