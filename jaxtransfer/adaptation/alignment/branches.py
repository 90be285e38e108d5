"""A branch for each source on one encoder: features and a classifier of its own, and the mean of what all predict."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.adaptation.adversarial.networks import classifier
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model, given

ENCODER = "encoder"


def branched(
    model: Model,
    sources: Sequence[str],
    classes: int,
    *,
    dim: int = 256,
    batch_norm: bool = True,
    tap: str = "features",
) -> Model:
    """Returns a model with a branch for each source, of MFSAN (Zhu et al. 2019).

    A branch is a linear layer, batch norm and ReLU, its features [B, dim], and a linear classifier on them. Outputs are
    those of the model, `<source>/features` and `<source>/logits` of each branch, and as `logits` the logarithm of the
    mean of all branches' probabilities, which is what MFSAN predicts by: it is evaluated and saved as any model.
    (What the model gave as `logits` itself is not read; its own head, if it has one, learns nothing.)

        net = jt.adaptation.branched(jt.models.resnet18(10), ("a", "b"), classes=10)

    Args:
      model: the encoder; the result has its name, its variables are under `encoder`.
      sources: the names of the branches, as those of the sources in the batch.
      classes: C.
      dim: of the branches' features.
      batch_norm: whether these are normalised before their ReLU.
      tap: the model's output that the branches see, flattened.

    Raises:
      InputError: for no source, one that is named twice or `encoder`, for a twin, and a dim below one; when called, for
        an unknown output.
    """
    names = tuple(sources)
    if isinstance(sources, str) or not names or len(set(names)) < len(names) or ENCODER in names:
        raise InputError(
            f"branches need the names of one source or more, each another and none 'encoder'; got {sources}"
        )
    if model.shares is not None:
        raise InputError(f"model {model.name!r} is a twin: make the branches first, and then branched(...).twin(...)")
    parts = {name: classifier(classes, hidden=(dim,), batch_norm=batch_norm, name=name) for name in names}

    def read(outputs: Mapping[str, Any]) -> Any:
        if tap not in outputs:
            raise unknown(f"output of model {model.name!r}", tap, outputs)
        return outputs[tap]

    def init(key, inputs):
        keys = jax.random.split(key, 1 + len(names))
        variables = {ENCODER: dict(model.init(keys[0], inputs))}
        seen = read(jax.eval_shape(_outputs_of(model), variables[ENCODER], inputs))
        x = jnp.zeros(seen.shape, seen.dtype)
        for name, one in zip(names, keys[1:], strict=True):
            variables[name] = dict(parts[name].init(one, x))
        return _by_kind(variables)

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        own = _by_part(variables, (ENCODER, *names))

        def where(part):
            return given(axis=axis, still=None if still is None else still.get(part))

        outputs, state = model.apply(own[ENCODER], inputs, train=train, key=key, **where(ENCODER))
        outputs, states, predicted = dict(outputs), {ENCODER: dict(state)}, []
        for name in names:
            found, state = parts[name].apply(own[name], read(outputs), train=train, key=None, **where(name))
            outputs |= {f"{name}/{output}": found[output] for output in ("features", "logits")}
            predicted.append(jax.nn.log_softmax(found["logits"]))
            states[name] = dict(state)
        outputs["logits"] = jax.nn.logsumexp(jnp.stack(predicted), axis=0) - jnp.log(len(names))
        return outputs, _by_kind(states)

    stages = (*(f"{ENCODER}/(?:{stage})" for stage in model.stages or (".*",)), "|".join(names))
    frozen = {ENCODER: model.frozen} if model.frozen else {}
    return dataclasses.replace(model, init=init, apply=apply, stages=stages, frozen=frozen)


def _outputs_of(model: Model) -> Any:
    return lambda variables, inputs: model.apply(model.complete(variables), inputs, train=False, key=None)[0]


def _by_kind(by_part: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {kind: {part: values}} of {part: {kind: values}}."""
    kinds = dict.fromkeys(kind for values in by_part.values() for kind in values)
    return {kind: {part: values[kind] for part, values in by_part.items() if kind in values} for kind in kinds}


def _by_part(by_kind: Mapping[str, Mapping[str, Any]], parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns {part: {kind: values}} of {kind: {part: values}}."""
    return {part: {kind: values[part] for kind, values in by_kind.items() if part in values} for part in parts}
