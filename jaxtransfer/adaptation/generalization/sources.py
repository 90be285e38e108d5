"""Several labelled domains to learn from: what a model gives on each, and what objectives of single ones say."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Context, Mean, Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.masking import weights_of
from jaxtransfer.parts.rows import kept


class Rows(NamedTuple):
    """One domain's labelled examples of this device.

    Attributes:
      logits: [B, C], zero in rows that don't count.
      features: what a tap names, [B, D] say, likewise; None where no tap was asked for.
      labels: of the batch.
      weights: [B], how much each example counts; None where all do alike.
    """

    logits: jax.Array
    features: Any
    labels: jax.Array
    weights: jax.Array | None


class Sources(NamedTuple):
    """The domains of a term, in the order in which they are given.

    Attributes:
      domains: the model's run on each.
      output: the model's output that holds the logits.
      tap: the one that holds the features, or None.
      view: the entry of a domain's batch that holds the inputs.
      label: the one that holds the labels.
    """

    domains: tuple[Domain, ...]
    output: str
    tap: str | None
    view: str
    label: str

    @classmethod
    def of(
        cls, model: Model, domains: Sequence[str], *, output: str, view: str, label: str, tap: str | None = None
    ) -> "Sources":
        """Returns the domains of these names.

        Raises:
          InputError: for fewer than two names, and for one that is given twice.
        """
        names = check_domains(domains)
        return cls(tuple(Domain.of(model, name, view) for name in names), output, tap, view, label)

    @property
    def forwards(self) -> tuple[Any, ...]:
        """The runs of the model."""
        return tuple(domain.forward for domain in self.domains)

    def rows(self, outputs: Mapping[Any, Any], batch: Batch) -> list[Rows]:
        """Returns each domain's examples."""
        found = []
        for domain in self.domains:
            part = domain.part(batch)
            weights = weights_of(part, besides=(self.view, self.label))
            features = None if self.tap is None else kept(domain.read(outputs, self.tap), weights)
            logits = kept(domain.read(outputs, self.output), weights)
            found.append(Rows(logits, features, view_of(part, (self.label,)), weights))
        return found

    def check(self, outputs: Mapping[Any, Any], batch: Batch) -> None:
        """Raises for a batch without labels that the model has classes for, and for outputs that aren't there."""
        for domain in self.domains:
            logits, part = domain.read(outputs, self.output), domain.part(batch)
            if self.tap is not None:
                domain.read(outputs, self.tap)
            check_labels(domain.forward.model.name, logits.shape[-1], part, self.label)


def check_domains(domains: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of several source domains.

    Raises:
      InputError: for one word, fewer than two names, and a name that is given twice.
    """
    if isinstance(domains, str) or len(domains) < 2 or not all(isinstance(name, str) for name in domains):
        raise InputError(
            f"domains are the names of two source domains or more, the entries of the batch that hold their batches: "
            f"domains=('photo', 'sketch'); got {domains!r}"
        )
    if len(set(domains)) < len(domains):
        raise InputError(f"each source domain counts once; got domains={tuple(domains)!r}")
    return tuple(domains)


def check_objectives(terms: Sequence[Objective], what: str) -> list[Objective]:
    """Returns the objectives of single domains.

    Raises:
      InputError: for fewer than two, or something else.
    """
    if isinstance(terms, Objective) or len(terms) < 2 or not all(isinstance(term, Objective) for term in terms):
        raise InputError(
            f"{what} takes a list of objectives, one for each of two source domains or more: "
            f"[jt.classification(model).on(name) for name in names]; got {terms!r:.80}"
        )
    if any(one.task is not None for term in terms for _, one in term.terms):
        raise InputError(f"{what}: a term is balanced by jt.balance; take the plain ones")
    return list(terms)


def values_of(terms: Sequence[Objective], *arguments: Any) -> tuple[jax.Array, Any, dict[str, Mean]]:
    """Returns the loss of each of several objectives [S], the state after them, and the metrics of all.

    Args:
      terms: the objectives, sums or not.
      *arguments: outputs, params, state, batch and the context, as a loss gets them.
    """
    outputs, params, state, batch, ctx = arguments
    losses, metrics = [], {}
    for term in terms:
        own, state, more = term.summed.values(outputs, params, state, batch, ctx)
        losses.append(sum(own[1:], start=own[0]))
        if both := sorted(metrics.keys() & more.keys()):
            raise InputError(f"two of the objectives report the metric {both[0]!r}; rename one: term.named('other')")
        metrics |= more
    dtype = jnp.result_type(*losses)
    return jnp.stack([loss.astype(dtype) for loss in losses]), state, metrics


def told(value: jax.Array, rows: Sequence[Rows], ctx: Context) -> Mean:
    """Returns a term's value as a metric, which counts as much as the examples that it is of.

    Where a domain has none the value tells nothing, as in `jaxtransfer.adaptation.domain.whole`, and doesn't count.
    """
    weights = [jnp.ones(len(one.logits)) if one.weights is None else one.weights for one in rows]
    counts = jnp.stack([ctx.sum(one) for one in weights])
    count = jnp.where(jnp.all(counts > 0), jnp.sum(counts), 0)
    shown = jax.lax.stop_gradient(value)
    return Mean(shown * count, count)


def told_of(value: jax.Array, terms: Sequence[Objective], metrics: Mapping[str, Mean]) -> Mean:
    """Returns a value of several objectives' losses as a metric; it doesn't count where one of them has no example.

    Args:
      value: a scalar.
      terms: the objectives.
      metrics: what they report.
    """
    counts = [metrics[one.name].count for term in terms for _, one in term.terms if one.name in metrics]
    counted = jnp.all(jnp.stack([count > 0 for count in counts])) if counts else jnp.ones((), bool)
    return Mean(jnp.where(counted, jax.lax.stop_gradient(value), 0), counted.astype(value.dtype))
