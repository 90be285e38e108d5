"""What a model is worth in each domain, and how far these are apart for it, as it trains."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import jaxtransfer as jt
from jaxtransfer.adaptation import selection
from jaxtransfer.cli.domains import TARGET, Domains
from jaxtransfer.representation import Embedded

GAP = "proxy_a_distance"
ACCURACY = f"{TARGET}/accuracy"
_SEEN = 2000  # unlabelled target examples that scores are taken of
_DRAWN = 500  # examples of each domain in a picture


class DomainScores:
    """`measure(state)` for `jt.fit`: accuracies by domain, the domain gap, and scores without target labels.

    The gap and the scores look at the target's training examples, up to 2,000 of them, and at the source's held-out
    ones; the target's accuracy at its test examples.

    Args:
      model: what trains.
      domains: the data.
      rows: examples at a time.
      scores: as for `jt.adaptation.selection.scored`.
    """

    def __init__(
        self, model: jt.Model, domains: Domains, rows: int, scores: Mapping[str, Callable[..., float]] | None = None
    ):
        self.model, self.domains, self._rows = model, domains, rows
        self._scores, self._run = dict(scores or {}), selection.seen_by(model)
        chosen = np.random.default_rng(0).permutation(len(domains.target))[:_SEEN]
        self._sets = {
            **domains.held,
            TARGET: domains.target.select(np.sort(chosen)),
            ACCURACY: domains.test,
        }
        self._sources = tuple(domains.held)
        self._batches = {
            name: jt.data.eval_batches(one, min(rows, len(one))) for name, one in self._sets.items() if one is not None
        }

    def __call__(self, state: Any) -> dict[str, float]:
        """Returns the scores of a training state, or of a run."""
        seen = self._seen(state)
        found = {f"{name}/accuracy": _accuracy(seen[name]) for name in self._sources}
        if ACCURACY in seen:
            found[ACCURACY] = _accuracy(seen[ACCURACY])
        source = _joined([seen[name] for name in self._sources]) if self._sources else None
        if source is not None and min(len(source.features), len(seen[TARGET].features)) > 1:
            found[GAP] = selection.proxy_a_distance(source.features, seen[TARGET].features)
        return found | selection.scored(self._scores, source=source, target=seen[TARGET])

    def of(self, model: jt.Model) -> "DomainScores":
        """Returns the same of another model, without the scores that choose."""
        return DomainScores(model, self.domains, self._rows)

    def drawn(self, state: Any) -> tuple[Embedded, Embedded] | None:
        """Returns features of both domains to draw, the target's with labels where it has some; None without a source.

        Args:
          state: a training state, or a run.
        """
        seen = self._seen(state)
        if not self._sources:
            return None
        pair = _joined([seen[name] for name in self._sources]), seen.get(ACCURACY, seen[TARGET])
        source, target = (_some(one) for one in pair)
        return source, target

    def _seen(self, state: Any) -> dict[str, selection.Seen]:
        name = self.model.name
        variables = {"params": self.model.whole(state.params), **state.state.get(name, {})}
        return {key: self._run(variables, batches) for key, batches in self._batches.items()}


def _accuracy(seen: selection.Seen) -> float:
    assert seen.labels is not None
    return selection.source_accuracy(seen.logits, seen.labels)


def _joined(several: list[selection.Seen]) -> selection.Seen:
    logits, features, labels = (np.concatenate(parts) for parts in zip(*several, strict=True))
    return selection.Seen(logits, features, labels)


def _some(seen: selection.Seen) -> Embedded:
    rows = np.sort(np.random.default_rng(0).permutation(len(seen.features))[:_DRAWN])
    labels = np.empty(0, np.int32) if seen.labels is None else seen.labels[rows]
    return Embedded(seen.features[rows], labels)
