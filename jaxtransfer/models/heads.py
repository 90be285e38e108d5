"""Heads on an encoder, projections and predictions of self-supervised learning: one model with the encoder inside."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model, given
from jaxtransfer.models.batch_norm import BatchNorm
from jaxtransfer.models.linen import linen

ENCODER = "encoder"


class Perceptron(nn.Module):
    """See `head`."""

    sizes: tuple[int, ...]
    batch_norm: bool = True
    last_norm: bool = False
    last_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the vectors [B, sizes[-1]] of `x` [B, D]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for number, size in enumerate(self.sizes, 1):
            last = number == len(self.sizes)
            norm = self.batch_norm and (self.last_norm or not last)
            x = nn.Dense(size, use_bias=not norm and (self.last_bias or not last), name=f"dense{number}", **kinds)(x)
            if norm:
                x = BatchNorm(train, axis=self.axis, name=f"norm{number}", **kinds)(x)
            x = x if last else nn.relu(x)
        return {"output": x}


def head(
    *sizes: int,
    batch_norm: bool = True,
    last_norm: bool = False,
    last_bias: bool = True,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns a perceptron from vectors to vectors, with ReLU between its layers: a projector or a predictor.

    SimCLR projects by `head(2048, 128)`, BYOL projects and predicts by `head(4096, 256)`, SimSiam, Barlow Twins and
    VICReg have three layers (SimSiam's with `last_norm=True`, the others' with `last_bias=False`: their losses don't
    see a shift).

    Args:
      *sizes: outputs of the layers; the last one is the dimension of the embedding.
      batch_norm: whether each layer but the last is followed by batch norm.
      last_norm: whether the last one is, too.
      last_bias: whether the last one adds a bias, where it has no batch norm.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    if not sizes or min(sizes) < 1:
        raise InputError(f"a head needs the sizes of its layers, at least 1 each; got {sizes}")
    return linen(Perceptron(sizes, batch_norm, last_norm, last_bias, dtype=dtype, param_dtype=param_dtype), name="head")


def with_heads(encoder: Model, /, **heads: tuple[str, Model] | Model) -> Model:
    """Returns one model of an encoder and heads on it.

    Its parameters are `{"encoder": ..., <head>: ...}`, its outputs those of the encoder and one for each head under its
    name. `encoder_of` gives back the encoder's variables, to fine-tune from.

    Args:
      encoder: what gives `features`; the result has its name.
      **heads: by the name of their output, in order: a model, which reads `features`, or a pair of the output that it
        reads, an earlier head's say, and a model: `projection=head(9, 4), prediction=("projection", head(9, 4))`.

    Raises:
      InputError: for a head called `encoder`, and for a twin; when called, for an output that does not exist.
    """
    if ENCODER in heads:
        raise InputError(f"a head can't be called {ENCODER!r}; choose another name")
    parts = {name: given if isinstance(given, tuple) else ("features", given) for name, given in heads.items()}

    if twins := [one.name for one in (encoder, *(model for _, model in parts.values())) if one.shares is not None]:
        raise InputError(f"model {twins[0]!r} is a twin: make the heads first, and then with_heads(...).twin(...)")

    def read(outputs: Mapping[str, Any], tap: str) -> Any:
        if tap not in outputs:
            raise unknown(f"output of {encoder.name!r}", tap, outputs)
        return outputs[tap]

    def init(key, inputs):
        keys = jax.random.split(key, 1 + len(parts))
        variables = {ENCODER: dict(encoder.init(keys[0], inputs))}
        shapes = outputs_of(encoder, variables[ENCODER], inputs)
        for number, (name, (tap, model)) in enumerate(parts.items(), 1):
            x = jnp.zeros(read(shapes, tap).shape, read(shapes, tap).dtype)
            variables[name] = dict(model.init(keys[number], x))
            shapes[name] = outputs_of(model, variables[name], x)["output"]
        return by_kind(variables)

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        own = by_part(variables, (ENCODER, *parts))

        def where(part):
            return given(axis=axis, still=None if still is None else still.get(part))

        outputs, state = encoder.apply(own[ENCODER], inputs, train=train, key=key, **where(ENCODER))
        outputs, states = dict(outputs), {ENCODER: dict(state)}
        for number, (name, (tap, model)) in enumerate(parts.items(), 1):
            drawn = None if key is None else jax.random.fold_in(key, number)
            found, state = model.apply(own[name], read(outputs, tap), train=train, key=drawn, **where(name))
            outputs[name], states[name] = found["output"], dict(state)
        return outputs, by_kind(states)

    stages = (*(f"{ENCODER}/(?:{stage})" for stage in encoder.stages or (".*",)), "|".join(parts) or "head")
    models = {ENCODER: encoder, **{name: model for name, (_, model) in parts.items()}}
    frozen = {part: model.frozen for part, model in models.items() if model.frozen}
    made = dataclasses.replace(encoder, init=init, apply=apply, stages=stages, frozen=frozen)
    twice = encoder.recipe is not None and encoder.recipe.heads  # heads on heads: no encoder of the zoo is inside
    return made.made_from(None if twice else encoder.recipe, heads=True)


def encoder_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the encoder's variables of a model that `with_heads` made."""
    return {kind: values[ENCODER] for kind, values in variables.items() if ENCODER in values}


def outputs_of(model: Model, variables: Any, inputs: Any) -> dict[str, Any]:
    """Returns the shapes of a model's outputs."""
    run = jax.eval_shape(lambda v, x: model.apply(model.complete(v), x, train=False, key=None)[0], variables, inputs)
    return dict(run)


def by_kind(by_part: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {kind: {part: values}} of {part: {kind: values}}: parts without a kind (no batch norm) have no entry."""
    kinds = dict.fromkeys(kind for values in by_part.values() for kind in values)
    return {kind: {part: values[kind] for part, values in by_part.items() if kind in values} for kind in kinds}


def by_part(by_kind: Mapping[str, Mapping[str, Any]], parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Returns {part: {kind: values}} of {kind: {part: values}}."""
    return {part: {kind: values[part] for kind, values in by_kind.items() if part in values} for part in parts}
