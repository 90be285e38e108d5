"""Outputs of several models fused into one model: ensembles, stacking, sums, mixtures of experts by a gate."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.models.composition import Call, composed, distinct
from jaxtransfer.models.heads import head

Members = Sequence[Any]  # models that train; frozen ones and runs, which don't
Combine = Callable[[jax.Array, jax.Array], jax.Array]
COMBINER, GATE, EACH = "combiner", "gate", "members"


def mean_of_probabilities(logits: jax.Array, log_shares: jax.Array) -> jax.Array:
    """Computes log Σ_m s_m softmax(z_m), the logarithms of mixed probabilities, which are logits of them.

    Computed among logarithms, so that no probability becomes 0 by rounding, however extreme the logits.

    Args:
      logits: z [M, B, C], in at least float32.
      log_shares: log s, [M, 1] or [M, B]; Σ_m s_m = 1.
    """
    return jax.nn.logsumexp(log_shares[..., None] + jax.nn.log_softmax(logits, axis=-1), axis=0)


def mean_of_label_probabilities(logits: jax.Array, log_shares: jax.Array) -> jax.Array:
    """Computes logit(Σ_m s_m sigmoid(z_m)): where any number of labels hold at once, each by itself.

    Args:
      logits: z [M, B, C], in at least float32.
      log_shares: log s, [M, 1] or [M, B]; Σ_m s_m = 1.
    """
    holds, not_so = (jax.nn.logsumexp(log_shares[..., None] + jax.nn.log_sigmoid(z), axis=0) for z in (logits, -logits))
    return holds - not_so


def mean_of_logits(logits: jax.Array, log_shares: jax.Array) -> jax.Array:
    """Computes Σ_m s_m z_m: of logits the geometric mean of the probabilities, normalised; of values their mean.

    Args:
      logits: z [M, B, ...], in at least float32.
      log_shares: log s, [M, 1] or [M, B]; Σ_m s_m = 1.
    """
    shares = jnp.exp(log_shares).reshape(*log_shares.shape, *[1] * (logits.ndim - 2))
    return jnp.sum(shares * logits, axis=0)


def ensemble(
    members: Members,
    combine: Combine = mean_of_probabilities,
    *,
    weights: Sequence[float] | None = None,
    output: str = "logits",
    name: str = "ensemble",
) -> Model:
    """Returns the model of what several say together, by default the mean of their probabilities, log Σ_m w_m p_m(x).

    (Deep ensembles: Lakshminarayanan et al. 2017, arXiv:1612.01474.) It is a model like any other: to evaluate, to
    train further, to average (`jt.ema`), to distil into one net:

        whole = jt.models.ensemble([jt.load_run(f"runs/seed-{n}") for n in range(5)])
        teacher = jt.frozen(whole, {"params": {}})  # nothing of it trains
        jt.evaluate(jt.classification(teacher), state, batches)
        objective = jt.classification(student) + jt.distillation(student, teacher)

    A member is a model, which trains, or one that is fixed, `jt.frozen(model, variables)` or a run, `jt.load_run(...)`:
    that runs in inference mode, gets no gradient, and is neither part of the state nor of checkpoints nor of the
    program. All see the same inputs; each normalises them by itself. Parameters are nested by the names of the members,
    those of one name numbered, `model0`, `model1`; training begins with given weights by
    `jt.fit(..., params={"ensemble": {"model0": variables["params"], ...}})`. A run of it is read again by
    `jt.load_run(directory, model=whole)`. Outputs: `output`, and `members` [B, M, ...], what each says.

    Args:
      members: one or more.
      combine: `mean_of_probabilities`; `mean_of_logits`, also for values of a regression; or, where labels are no
        classes and any number hold at once, `mean_of_label_probabilities`. One's own is a function of the outputs
        [M, B, ...] and of the logarithms of the weights, [M, 1], which add up to 1.
      weights: of the members, not negative; they are divided by their sum. All alike by default.
      output: what of the members is combined, and what the result is called.
      name: of the model.

    Raises:
      InputError: for no members, what is none, weights that are none, and runs of different classes; when called, for
        outputs that don't exist, and for different numbers of classes.
    """
    parts = _parts(members, combine)
    log_shares = _log_shares(weights, len(parts))

    def run(call: Call, inputs: Any) -> dict[str, Any]:
        said = _said(call, parts, inputs, output)
        return {output: combine(said, jnp.asarray(log_shares, said.dtype)[:, None]), EACH: jnp.moveaxis(said, 0, 1)}

    return _made(name, parts, run)


def added(
    members: Members, *, weights: Sequence[float] | None = None, output: str = "logits", name: str = "added"
) -> Model:
    """Returns the model f(x) = Σ_m w_m f_m(x): what a source says, and what another learns to say besides.

    (The blend of a base and a side network: Zhang et al. 2020, "Side-tuning", arXiv:1912.13503.)

        source = jt.load_run("runs/source")
        net = jt.models.added([source, jt.models.small_cnn(10, name="target")])
        jt.fit(jt.classification(net), optimizer, batches, steps=1000)  # the target trains, the source stays

    Args:
      members: models that train, and frozen models or runs, which don't; see `ensemble`.
      weights: w, finite; 1 for each by default.
      output: what of the members is added up, and what the result is called.
      name: of the model.

    Raises:
      InputError: as for `ensemble`.
    """
    parts = _parts(members)
    factors = np.ones(len(parts)) if weights is None else _numbers(weights, len(parts))

    def run(call: Call, inputs: Any) -> dict[str, Any]:
        said = _said(call, parts, inputs, output)
        return {output: jnp.tensordot(jnp.asarray(factors, said.dtype), said, 1), EACH: jnp.moveaxis(said, 0, 1)}

    return _made(name, parts, run)


def stacked(
    members: Members,
    combiner: Model,
    *,
    read: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
    output: str = "logits",
    name: str = "stacked",
) -> Model:
    """Returns stacking: a small model that learns what to make of what the members say, c(p_1(x), ..., p_M(x)).

    (Wolpert 1992, "Stacked generalization", Neural Networks 5(2); of probabilities as in Ting, Witten 1999, "Issues in
    stacked generalization", JAIR 10.) Train it on examples that the members were not trained on: what they say of those
    they know is surer than it is right.

        net = jt.models.stacked([jt.load_run("runs/a"), jt.load_run("runs/b")], jt.models.head(10, batch_norm=False))
        jt.fit(jt.classification(net), optax.adam(1e-2), jt.data.pipeline(held_out, 64), steps=500)

    Its parameters are those of members that train, and `combiner`; its outputs as those of `ensemble`.

    Args:
      members: models that train, and frozen models or runs, which don't; see `ensemble`.
      combiner: a model of vectors [B, M · C], with `logits` or an `output`.
      read: what it reads of each [B, C]: their probabilities, or `jax.nn.log_softmax`, `jax.nn.sigmoid` for labels of
        which any number hold, `lambda x: x` for values.
      output: what of the members is read, and what the result is called.
      name: of the model.

    Raises:
      InputError: as for `ensemble`.
    """
    parts = _parts(members)
    distinct(*parts, COMBINER)

    def run(call: Call, inputs: Any) -> dict[str, Any]:
        said = jnp.moveaxis(_said(call, parts, inputs, output), 0, 1)
        found = call(COMBINER, jax.vmap(read, 1, 1)(said).reshape(len(said), -1))
        return {output: _vectors(COMBINER, found), EACH: said}

    return _made(name, parts, run, {COMBINER: combiner})


def gated(
    members: Members,
    gate: Model | None = None,
    combine: Combine = mean_of_probabilities,
    *,
    output: str = "logits",
    name: str = "gated",
) -> Model:
    """Returns a mixture of experts, Σ_m softmax(g(x))_m p_m(x): a gate tells whom to believe on an example.

    (Jacobs et al. 1991, "Adaptive mixtures of local experts", Neural Computation 3(1).) The experts are given, trained
    already and frozen, or train along. For experts that share a task's head see `mmoe`.

        net = jt.models.gated([jt.load_run("runs/photos"), jt.load_run("runs/drawings")], jt.models.small_cnn(2))

    Its parameters are those of members that train, and `gate`; its outputs those of `ensemble`, and `gate` [B, M], the
    share of each.

    Args:
      members: models that train, and frozen models or runs, which don't; see `ensemble`.
      gate: a model of the same inputs, with scores [B, M] as `logits` or `output`; by default a linear one on the flat
        inputs, which must be one array of floating-point numbers.
      combine: as in `ensemble`; it is given the logarithms of the shares, [M, B].
      output: what of the members is mixed, and what the result is called.
      name: of the model.

    Raises:
      InputError: as for `ensemble`; when called, for a gate of another number of scores.
    """
    parts = _parts(members, combine)
    distinct(*parts, GATE)

    def run(call: Call, inputs: Any) -> dict[str, Any]:
        said = _said(call, parts, inputs, output)
        scores = _vectors(GATE, call(GATE, _flat(inputs) if gate is None else inputs))
        if scores.shape != (said.shape[1], len(parts)):
            raise InputError(
                f"the gate must give a score for each of the {len(parts)} members, {(said.shape[1], len(parts))}; got "
                f"{scores.shape}"
            )
        log_shares = jax.nn.log_softmax(scores.astype(said.dtype), axis=-1)
        mixed = combine(said, log_shares.T)
        return {output: mixed, GATE: jnp.exp(log_shares), EACH: jnp.moveaxis(said, 0, 1)}

    return _made(name, parts, run, {GATE: gate or head(len(parts), batch_norm=False)})


def _parts(members: Members, combine: Combine | None = None) -> dict[str, Model]:
    """Returns the members as models, by name; those that are fixed as models with nothing to train."""
    given = [members] if isinstance(members, Model) or not isinstance(members, Sequence) else list(members)
    if not given:
        raise InputError("expected models to combine, one or more; got none")
    models = []
    for member in given:
        part = member if isinstance(member, Model) else getattr(member, "part", None)
        if not isinstance(part, Model):
            raise InputError(
                f"expected models to combine: a jt.Model, which trains, or a fixed one, jt.frozen(model, variables) or "
                f"jt.load_run(...); got a {type(member).__name__}"
            )
        models.append(part)
    _check_classes(given, combine)
    names = [model.name for model in models]
    called = [one if names.count(one) == 1 else f"{one}{names[:n].count(one)}" for n, one in enumerate(names)]
    distinct(*called)
    return dict(zip(called, models, strict=True))


def _check_classes(members: Sequence[Any], combine: Combine | None) -> None:
    """Raises for runs whose outputs are not of the same classes in one order, as far as they say it."""
    known = [(member, tuple(member.class_names)) for member in members if getattr(member, "class_names", ())]
    for member, names in known[1:]:
        if names != known[0][1]:
            same = sorted(names) == sorted(known[0][1])
            raise InputError(
                f"models of the same classes, in one order, can be combined; {known[0][0]} has "
                f"{', '.join(known[0][1][:4])} ..., and {member} {'them in another order' if same else 'others'}, "
                f"{', '.join(names[:4])} ...: bring its head into that order by jt.fusion.match_heads"
            )
    kinds = [getattr(member, "knows", ()) for member in members]
    if combine is mean_of_probabilities and any("labels" in kind for kind in kinds):
        raise InputError(
            "these runs know labels of which any number hold, so that a softmax means nothing: combine them by "
            "jt.models.mean_of_label_probabilities"
        )


def _said(call: Call, parts: Mapping[str, Model], inputs: Any, output: str) -> jax.Array:
    """Returns what the members say [M, B, ...], in at least float32."""
    found = {}
    for name in parts:
        outputs = call(name, inputs)
        if output not in outputs:
            raise unknown(f"output of member {name!r}", output, outputs)
        found[name] = outputs[output]
    shapes = {name: tuple(jnp.shape(one)[1:]) for name, one in found.items()}
    if len(set(shapes.values())) > 1:
        told = {name: shape[0] if len(shape) == 1 else shape for name, shape in shapes.items()}
        raise InputError(
            f"models of the same classes can be combined; {output!r} of these are of different sizes {told}"
        )
    dtype = jnp.result_type(jnp.float32, *(one.dtype for one in found.values()))
    return jnp.stack([one.astype(dtype) for one in found.values()])


def _made(name: str, parts: Mapping[str, Model], run: Any, more: Mapping[str, Model] | None = None) -> Model:
    """Returns the model, whose layers for layer-wise rates are those of the one member that trains, or all in one."""
    trained = {part: model for part, model in parts.items() if not _is_fixed(model)}
    stages: tuple[str, ...] = ()
    if len(trained) == 1:
        ((part, model),) = trained.items()
        stages = tuple(f"{re.escape(part)}/(?:{stage})" for stage in model.stages or (".*",))
    elif trained:
        stages = ("|".join(f"{re.escape(part)}/.*" for part in trained),)
    own = dict(more or {})
    first = next(iter(parts.values()))
    return composed(first.named(name), {**parts, **own}, run, stages=(*stages, *(f"{part}/.*" for part in own)))


def _is_fixed(model: Model) -> bool:
    """Whether a part is a model that is fixed as a whole."""
    return "variables" in model.frozen


def _log_shares(weights: Sequence[float] | None, members: int) -> np.ndarray:
    """Returns the logarithms of weights that add up to 1, −∞ of 0."""
    known = np.ones(members) if weights is None else _numbers(weights, members)
    if np.any(known < 0):
        raise InputError(f"weights of a mean must not be negative; got {known.tolist()}. jt.models.added takes any")
    return np.where(known > 0, np.log(np.where(known > 0, known / known.sum(), 1)), -np.inf)


def _numbers(weights: Sequence[float], members: int) -> np.ndarray:
    known = np.asarray(weights, float)
    if known.shape != (members,) or not np.all(np.isfinite(known)) or not np.any(known):
        raise InputError(
            f"weights must be one finite number for each of the {members} members, not all 0; got {list(weights)}"
        )
    return known


def _vectors(part: str, outputs: Mapping[str, Any]) -> jax.Array:
    """Returns what a combiner or a gate gives."""
    for name in ("logits", "output"):
        if name in outputs:
            return outputs[name]
    raise InputError(f"the {part} gives neither logits nor an output; it gives {', '.join(sorted(outputs))}")


def _flat(inputs: Any) -> jax.Array:
    """Returns the inputs as vectors, for a linear gate."""
    if not hasattr(inputs, "ndim") or inputs.ndim < 2 or not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise InputError(
            "the gate by default reads one array [B, ...] of floating-point numbers; these inputs are something else, "
            "so give a gate: a model of them with as many logits as there are members"
        )
    return inputs.reshape(inputs.shape[0], -1)
