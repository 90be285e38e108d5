"""SHOT: a trained classifier stays, and the features of the target move to its classes, without any source data."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.adaptation.domain import Domain, whole
from jaxtransfer.adaptation.self_training.guesses import check_index, check_logits, if_numbered
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Objective, view_of
from jaxtransfer.parts.outputs import pick


def shot(
    model: Model,
    *,
    examples: int,
    strength: float = 0.3,
    eps: float = 1e-5,
    output: str = "logits",
    view: str = "image",
    target: str = "target",
) -> Objective:
    """Builds (1/B) Σ H(p_b) − H(p̄) + β (1/B) Σ CE(ŷ_b, f(x_b)) on the target: SHOT (Liang et al. 2020).

    arXiv:2002.08546. Information maximisation, and cross-entropy against pseudo-labels ŷ of the whole target, which
    `shot_labels` makes anew now and then. The model starts from the source's weights, and its head stays:

        batches = jt.data.zipped(target=jt.data.pipeline(numbered, 64))  # numbered: with a column `index`
        labels = jt.adaptation.shot_labels(model, jt.data.eval_batches(target, 256))
        fitted = jt.fit(
            jt.adaptation.shot(model, examples=len(target)),
            jt.optim.freeze(optax.sgd(0.01, 0.9), f"{model.name}/{model.head}"),
            batches, steps=1000, refresh=jt.Refresh(100, labels), params=source.params, state=source.state,
        )

    The batch holds each example's number as `index`: `target.with_columns({"index": np.arange(len(target))})`, one
    out of range makes the loss NaN. Before the first refresh, which comes before step 0, there are no labels, and the
    second term is 0.

    Args:
      model: what trains.
      examples: N, how many examples the target has; `index` is in [0, N).
      strength: β, 0.3 as released for pictures of objects; 0.1 for digits.
      eps: what is added inside of the logarithms, as released; see `jt.losses.information_maximization`.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch that the model sees.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metrics `shot`, `shot/information` and `shot/labels`, the two terms before β.

    Raises:
      InputError: for no examples and a negative strength; at init, for a batch without the target or its `index`, and
        for an index out of range.
    """
    if examples < 1:
        raise InputError(f"shot: examples must be at least 1, the size of the target; got {examples}")
    check_strength(strength)
    check_strength(eps, "eps")
    domain = Domain.of(model, target, view)
    name = entry_of(model, target)

    def setup(key, batch):
        return {}, {name: {"label": jnp.full(examples, -1, jnp.int32)}}

    def loss(outputs, params, state, batch, ctx):
        logits, mask = domain.gathered(outputs, output, batch, ctx)
        index = ctx.gather(view_of(domain.part(batch), ("index",)))
        information = losses.information_maximization(logits, eps=eps, mask=mask)
        label = state[name]["label"][index]
        values = losses.cross_entropy(logits, jnp.maximum(label, 0))
        weights = mask.astype(values.dtype)
        count = jnp.sum(weights)
        taught = jnp.sum(jnp.where((weights > 0) & (label >= 0), values, 0) * weights) / jnp.maximum(count, 1e-30)
        value = if_numbered(information + strength * taught, index, mask, examples)
        metrics = {"shot": value, "shot/information": information, "shot/labels": taught}
        return value, state, {metric: whole(number, ctx, mask) for metric, number in metrics.items()}

    def check(outputs, batch):
        check_logits(domain, outputs, output)
        check_index("shot", domain.part(batch), target, examples)

    return Objective("shot", (domain.forward,), loss, setup=setup, check=check)


class shot_labels:
    """Pseudo-labels of the whole target, by the nearest centroid of a class: `jt.Refresh(every, shot_labels(...))`.

    As released: centroids c_k = Σ p_k f / Σ p_k of the features f = (features, 1) / ‖·‖ weighted by the softmax p; each
    example gets the label of the nearest one by cosine, among the classes that some example has now; then once more,
    the labels in place of p. All in inference mode and in float64, so that a run that goes on makes the same ones.

    Args:
      model: the one that `shot` trains.
      batches: of the whole target in order, of `jt.data.eval_batches`, which can be read again and again; rows with
        `mask` 0 are padding. Where they have an `index`, it is the example's number.
      rounds: how often centroids and labels are made.
      least: a class counts where more examples than these have it now; 0 as released.
      tap: the model's output that holds the features [B, D].
      output: the one that holds the logits [B, C].
      view: the entry of a batch that the model sees.
      target: as for `shot`, of which the entry in the state is named.
    """

    def __init__(
        self,
        model: Model,
        batches: Iterable[Batch],
        *,
        rounds: int = 2,
        least: int = 0,
        tap: str = "features",
        output: str = "logits",
        view: str = "image",
        target: str = "target",
    ):
        if rounds < 1 or least < 0:
            raise InputError(f"shot_labels needs rounds of at least 1 and least of at least 0; got {rounds}, {least}")
        if isinstance(batches, Mapping) or iter(batches) is batches:
            raise InputError(
                f"shot_labels reads the target again at each refresh; got a {type(batches).__name__}: pass "
                f"jt.data.eval_batches(target, 256)"
            )
        self.model, self.batches, self.rounds, self.least = model, batches, rounds, least
        self.outputs, self.view, self.entry = (tap, output), view, entry_of(model, target)
        self._run = jax.jit(self._outputs)

    def fingerprint(self) -> dict[str, Any]:
        """What determines the labels, besides the weights: compared when a run goes on."""
        told = getattr(self.batches, "fingerprint", None)
        data = told() if callable(told) else type(self.batches).__name__
        return {"rounds": self.rounds, "least": self.least, "outputs": list(self.outputs), "data": data}

    def __call__(self, state: Any) -> dict[str, Any]:
        """Returns the entry of the state with the labels [N] of the weights in a training state."""
        count = len(state.state[self.entry]["label"])
        params, kept = jax.device_get((state.params, state.state.get(self.model.name, {})))
        variables = jax.device_put(self.model.complete({"params": self.model.whole(params), **kept}))
        index, features, logits = self._read(variables)
        if len(index) != count or not np.array_equal(np.sort(index), np.arange(count)):
            raise InputError(
                f"shot_labels must see each of the {count} examples of the target once; its batches have {len(index)}"
            )
        label = np.zeros(count, np.int32)
        label[index] = nearest_centroids(features, logits, rounds=self.rounds, least=self.least)
        return {self.entry: {"label": label}}

    def _outputs(self, variables, inputs):
        found, _ = self.model.apply(variables, inputs, train=False, key=None)
        return pick(f"model {self.model.name!r}", found, self.outputs)

    def _read(self, variables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the numbers, features and logits of all examples."""
        numbers, features, logits, seen = [], [], [], 0
        for batch in self.batches:
            rows = [np.asarray(one) for one in self._run(variables, batch[self.view])]
            keep = np.asarray(batch.get("mask", np.ones(len(rows[0])))) > 0
            own = batch["index"] if "index" in batch else seen + np.cumsum(keep) - 1
            seen += int(keep.sum())
            numbers.append(np.asarray(own)[keep])
            features.append(rows[0].reshape(len(keep), -1)[keep])
            logits.append(rows[1][keep])
        if not seen:
            raise InputError("shot_labels: expected at least one example of the target, got none")
        return np.concatenate(numbers), np.concatenate(features), np.concatenate(logits)


def nearest_centroids(features: Any, logits: Any, *, rounds: int = 2, least: int = 0) -> np.ndarray:
    """Returns the label [N] of each example's nearest centroid, as in `shot_labels`.

    Args:
      features: float [N, D].
      logits: float [N, C].
      rounds: how often centroids and labels are made.
      least: a class counts where more examples than these have it now.
    """
    features, logits = np.asarray(features, np.float64), np.asarray(logits, np.float64)
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    directions = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    label, classes = share.argmax(1), share.shape[1]
    for _ in range(rounds):
        centroids = share.T @ directions / (1e-8 + share.sum(0)[:, None])
        there = np.flatnonzero(np.bincount(label, minlength=classes) > least)
        if not len(there):
            raise InputError(f"no class has more than least={least} of the {len(label)} examples; choose a smaller one")
        lengths = np.linalg.norm(centroids[there], axis=1)
        cosine = directions @ centroids[there].T / np.where(lengths > 0, lengths, 1)
        label = there[cosine.argmax(1)]
        share = np.eye(classes)[label]
    return label.astype(np.int32)


def entry_of(model: Model, target: str) -> str:
    """Returns the name of the pseudo-labels in the state."""
    return f"{model.name}_{target}_shot"
