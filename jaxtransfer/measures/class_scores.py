"""Scores of a classifier over a whole data set, made of sums that add up over batches and devices."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.measures.reliability import Reliability
from jaxtransfer.parts.masking import check_weights

BINS = 15  # as Guo et al. (2017) have them
MOST = 4096  # classes of which a confusion matrix is kept: 64 MiB


@dataclasses.dataclass(frozen=True, eq=False)
class ClassScores:
    """How good a classifier is; every example counts once.

    A class without examples has recall NaN, one that is never predicted precision NaN, one of both F1 NaN; means over
    classes leave them out. Predictions are the largest logit, of equals the first.

    Attributes:
      examples: n, how many counted.
      support: int64 [C], examples of each class.
      predicted: int64 [C], how often each class was predicted.
      right: int64 [C], how often rightly.
      confusion: int64 [C, C], rows the true classes, columns the predicted ones; None of more than 4,096 classes.
      top: by k, the share of examples whose class is among the k largest logits.
      nll: the mean of −log p_y, the negative log likelihood; infinite where a true class was ruled out.
      brier: the mean of Σ_c (p_c − [c = y])², in [0, 2] (Brier 1950); of two classes twice the binary form.
      reliability: accuracy and confidence by bins of confidence.
    """

    examples: int
    support: np.ndarray
    predicted: np.ndarray
    right: np.ndarray
    confusion: np.ndarray | None
    top: Mapping[int, float]
    nll: float
    brier: float
    reliability: Reliability

    @property
    def accuracy(self) -> float:
        """The share of examples that is predicted rightly."""
        return float(np.sum(self.right) / self.examples)

    @property
    def recall(self) -> np.ndarray:
        """The accuracy within each class, float64 [C]: TP / (TP + FN)."""
        return _divided(self.right, self.support)

    @property
    def precision(self) -> np.ndarray:
        """The share of predictions of each class that is right, float64 [C]: TP / (TP + FP)."""
        return _divided(self.right, self.predicted)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of precision and recall, float64 [C]: 2 TP / (2 TP + FP + FN)."""
        return _divided(2 * self.right, self.support + self.predicted)

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have examples."""
        return float(np.nanmean(self.recall))

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that occur, as labels or as predictions."""
        return float(np.nanmean(self.f1))

    @property
    def ece(self) -> float:
        """Expected calibration error, in the bins of `reliability`."""
        return self.reliability.ece

    def summary(self) -> dict[str, float]:
        """Returns the scores that are one number each, by name."""
        top = {f"top{k}": value for k, value in self.top.items()}
        return {
            "accuracy": self.accuracy,
            **top,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "nll": self.nll,
            "brier": self.brier,
            "ece": self.ece,
        }

    def __repr__(self):
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.summary().items())
        return f"ClassScores({self.examples} examples, {len(self.support)} classes: {told})"


def class_scores(
    logits: ArrayLike, labels: ArrayLike, *, mask: ArrayLike | None = None, bins: int = BINS, top: Sequence[int] = (5,)
) -> ClassScores:
    """Scores logits that are there already; over batches `jt.evaluate(measures=jt.measures.classification(model))`.

    Args:
      logits: float [N, C].
      labels: integers [N], or probabilities [N, C], whose largest is the class.
      mask: [N]; examples with 0 do not count. None where all do.
      bins: of the reliability diagram and the calibration error, of equal width.
      top: each k of top-k accuracy; those of C classes or more are left out.

    Returns:
      A `ClassScores`.

    Raises:
      InputError: where nothing counts, a label is none of the C classes, logits are NaN or +∞, or shapes do not fit.
    """
    check_arguments(bins, top)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    keep = jnp.ones(logits.shape[:1], bool) if mask is None else jnp.asarray(mask) > 0
    if mask is not None:
        check_weights(mask)
    if keep.shape != logits.shape[:1]:
        raise InputError(f"mask must have one entry per example, {logits.shape[:1]}; got {keep.shape}")
    return scores_of(jax.device_get(_sums_of_arrays(logits, labels, keep, bins, tuple(top))))


def check_arguments(bins: Any, top: Sequence[Any]) -> None:
    """Raises for a number of bins, or a k, that can be none."""
    if type(bins) is not int or bins < 1:
        raise InputError(f"bins must be a whole number of at least 1; got {bins!r}")
    if not isinstance(top, list | tuple) or any(type(k) is not int or k < 1 for k in top):
        raise InputError(f"top must be a list of whole numbers of at least 1, top=(5,) say; got {top!r}")


def sums_of(
    logits: jax.Array, labels: jax.Array, keep: jax.Array, bins: int = BINS, top: Sequence[int] = (5,)
) -> dict[str, Any]:
    """Returns what the scores are made of, sums over the examples [B] that `keep`, booleans, leaves in.

    Counts are integers, exact up to 2³¹ examples; the others are in at least float32.
    """
    logits = jnp.where(keep[:, None], logits, 0)
    right = losses.top_k(logits, labels) > 0  # checks the shapes
    classes, wide = logits.shape[-1], jnp.promote_types(logits.dtype, jnp.float32)
    hard = labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1)
    known = (hard >= 0) & (hard < classes)
    guess, hard = jnp.argmax(logits, axis=-1), jnp.where(keep & known, hard, 0)
    log_probabilities = jax.nn.log_softmax(logits.astype(wide), axis=-1)
    probabilities = jnp.exp(log_probabilities)
    confidence = jnp.max(probabilities, axis=-1)
    edges = jnp.arange(1, bins, dtype=wide) / bins
    place = jnp.sum(confidence[:, None] > edges[None], axis=-1)
    own = hard[:, None] == jnp.arange(classes)[None]
    ruled_out = jnp.max(jnp.where(own, log_probabilities, -jnp.inf), axis=-1)

    def count(which: jax.Array, places: jax.Array, size: int) -> jax.Array:
        return jnp.zeros(size, jnp.int32).at[places].add((which & keep).astype(jnp.int32))

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keep, values, 0))

    found = {
        "examples": jnp.sum(keep, dtype=jnp.int32),
        "unknown": jnp.sum(keep & ~known, dtype=jnp.int32),
        "not_finite": jnp.sum(keep & jnp.any(jnp.isnan(log_probabilities), axis=-1), dtype=jnp.int32),
        "support": count(known, hard, classes),
        "predicted": count(known, guess, classes),
        "right": count(known & right, hard, classes),
        "top": {
            k: jnp.sum(keep & (losses.top_k(logits, labels, k=k) > 0), dtype=jnp.int32) for k in top if k < classes
        },
        "nll": total(-ruled_out),
        "brier": total(jnp.sum(jnp.square(probabilities - own.astype(wide)), axis=-1)),
        "bins": {
            "count": count(known, place, bins),
            "right": count(known & right, place, bins),
            "confidence": jnp.zeros(bins, wide).at[place].add(jnp.where(keep, confidence, 0)),
        },
    }
    if classes <= MOST:
        found["confusion"] = count(known, hard * classes + guess, classes * classes).reshape(classes, classes)
    return found


_sums_of_arrays = jax.jit(sums_of, static_argnums=(3, 4))


def scores_of(sums: Mapping[str, Any]) -> ClassScores:
    """Returns the scores that sums over all examples make, from what `sums_of` gives.

    Raises:
      InputError: where nothing counted, a label was none of the classes, or logits were NaN or +∞.
    """
    examples = check_counted(sums)
    if wrong := int(sums["unknown"]):
        raise InputError(
            f"{wrong} of {examples} labels are none of the {len(sums['support'])} classes of the logits; labels count "
            f"from 0, in the order of the logits"
        )
    bins = sums["bins"]
    count = np.asarray(bins["count"], np.int64)
    whole = functools.partial(np.asarray, dtype=np.int64)
    return ClassScores(
        examples=examples,
        support=whole(sums["support"]),
        predicted=whole(sums["predicted"]),
        right=whole(sums["right"]),
        confusion=whole(sums["confusion"]) if "confusion" in sums else None,
        top={k: int(hits) / examples for k, hits in sums["top"].items()},
        nll=float(sums["nll"]) / examples,
        brier=float(sums["brier"]) / examples,
        reliability=Reliability(count, _divided(bins["right"], count), _divided(bins["confidence"], count)),
    )


def check_counted(sums: Mapping[str, Any]) -> int:
    """Returns how many examples counted.

    Raises:
      InputError: where none did, or the logits of some were NaN or +∞.
    """
    examples = int(sums["examples"])
    if not examples:
        raise InputError("no example counts: there are none, or the mask is 0 everywhere; is the split empty?")
    if wrong := int(sums["not_finite"]):
        raise InputError(
            f"the logits of {wrong} of {examples} examples are not finite, so that no score would mean anything; look "
            f"at the weights: has the training diverged?"
        )
    return examples


def _divided(part: Any, whole: Any) -> np.ndarray:
    """Returns part / whole in float64, NaN where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
