"""Optimiser recipes of transfer learning: which parameters move, how fast, and when; all through optax.

Frozen means frozen: the layers whose parameters `freeze`, `only`, `gradual_unfreeze` or an `optax.set_to_zero()` in
`by_path` holds still run in inference mode. Batch norm normalises by its running statistics and doesn't move them,
dropout doesn't drop, so a frozen body computes in training what it computes in evaluation. The optimiser's state notes
what is frozen, wherever in a chain it stands, and the training step reads it (`held_still`). Freezing that optax does
alone, `optax.multi_transform` or `optax.masked`, freezes parameters only: take `by_path`, or `model.inference(stages)`.
"""

import dataclasses
import functools
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.loss_scale import LossScaled as LossScaled
from jaxtransfer.loss_scale import loss_scaled as loss_scaled
from jaxtransfer.narrow_weights import master_weights as master_weights
from jaxtransfer.narrow_weights import stochastic_rounding as stochastic_rounding
from jaxtransfer.parts.extra_arguments import in_parts, of_part, taking

Optimizer = optax.GradientTransformation


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "inner_state"], meta_fields=["paths", "begin", "adapts"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Still:
    """The state of an optimiser that holds parameters still: it says which.

    Attributes:
      paths: of the parameters.
      begin: the update with which they begin to move; None for never.
      step, inner_state: updates so far, where they begin to move, and the state of the optimiser that then moves them.
      adapts: whether their layers stay in training mode all the same.
    """

    paths: tuple[str, ...]
    begin: int | None = None
    step: Any = ()
    inner_state: Any = ()
    adapts: bool = False

    @property
    def flag(self) -> Any:
        """Whether they are still: true, or a traced scalar."""
        return True if self.begin is None else jnp.less(self.step, self.begin)


def held_still(opt_state: Any, params: Any) -> dict[str, Any]:
    """Returns which parameters the next update leaves as they are, as `Context.still` holds it.

    Args:
      opt_state: the state of any optimiser.
      params: a dict by model name.

    Returns:
      For each model of which something is frozen a tree like its parameters, of bools or traced scalars.
    """
    flags: dict[str, Any] = {}
    for note in _notes(opt_state):
        flags |= {path: flags.get(path, False) | note.flag for path in note.paths if not note.adapts}
    named = {name for path in flags for name in params if path.startswith(f"{name}/")}
    return {
        name: jax.tree_util.tree_map_with_path(
            lambda path, _, name=name: flags.get(f"{name}/{tree.path_of(path)}", False), params[name]
        )
        for name in named
    }


def _notes(opt_state: Any) -> Iterator[Still]:
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Still)):
        if isinstance(node, Still):
            yield node
            yield from _notes(node.inner_state)


def by_path(rules: Mapping[str, Optimizer]) -> Optimizer:
    """Gives each parameter the optimiser of the first pattern that selects it.

    Args:
      rules: optimisers by path pattern, such as `{"head": optax.adam(1e-2), ".*": optax.adam(1e-4)}`; one that stands
        for several clips by their common norm. What gets `optax.set_to_zero()` is frozen, batch statistics included.

    Returns:
      An optimiser; its `init` raises `InputError` where a parameter is selected by no pattern or a pattern by none.
    """
    return _by_path({pattern: _frozen() if _is_zero(rule) else rule for pattern, rule in rules.items()})


def freeze(optimizer: Optimizer, patterns: tree.Patterns, *, adapt_statistics: bool = False) -> Optimizer:
    """Trains everything but the parameters that the patterns select; the frozen ones keep no optimiser state.

    Args:
      optimizer: trains the rest.
      patterns: path patterns of what is frozen: a layer whose parameters they all select runs in inference mode.
      adapt_statistics: leave frozen layers in training mode: their batch norm normalises by the batch and moves its
        running statistics to the new data, and their dropout drops. Only the parameters are then frozen.
    """
    frozen = _frozen(adapt_statistics)
    return _by_path({**dict.fromkeys(tree.as_patterns(patterns), frozen), _beside(patterns): optimizer})


def only(optimizer: Optimizer, patterns: tree.Patterns, *, adapt_statistics: bool = False) -> Optimizer:
    """Trains only the parameters that the patterns select: the head, in a linear probe; the rest is frozen.

    Args:
      optimizer: trains what is selected.
      patterns: path patterns of what trains.
      adapt_statistics: as for `freeze`.
    """
    frozen = _frozen(adapt_statistics)
    return _by_path({**dict.fromkeys(tree.as_patterns(patterns), optimizer), _beside(patterns): frozen})


def _by_path(rules: Mapping[str, Optimizer]) -> Optimizer:
    number_of = {rule: str(number) for number, rule in enumerate(dict.fromkeys(rules.values()))}
    transforms: dict[Hashable, Optimizer] = {number: of_part(rule) for rule, number in number_of.items()}
    numbers = {pattern: number_of[rule] for pattern, rule in rules.items()}

    def labels(params):
        if not _is_part(params):
            return tree.label(params, numbers)
        paths = list(tree.leaves_by_path(params))  # what stands around holds the rest: a whole stage may be frozen
        used = {pattern: number for pattern, number in numbers.items() if any(tree.matches(p, pattern) for p in paths)}
        return tree.label(params, used)

    return in_parts(optax.multi_transform(transforms, labels))


def _is_part(params: Any) -> bool:
    """Whether another optimiser around has hidden some of the parameters."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    return any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)


def _beside(patterns: tree.Patterns) -> str:
    """Returns a pattern of all the rest, which is no key of `patterns`."""
    return "(?:.*)" if ".*" in tree.as_patterns(patterns) else ".*"


def _frozen(adapts: bool = False) -> Optimizer:
    """Returns `optax.set_to_zero()` with a state that names what it is applied to."""

    def init(params) -> Any:
        return Still(tuple(tree.leaves_by_path(params)), adapts=adapts)

    return optax.GradientTransformation(init, optax.set_to_zero().update)


def _is_zero(rule: Optimizer) -> bool:
    """Returns whether `optax.set_to_zero` made the rule: its update is then a closure of the same code."""
    return getattr(rule.update, "__code__", None) is getattr(optax.set_to_zero().update, "__code__", rule)


def batch_norms(params: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns path patterns of the layers that keep running statistics, for `freeze`: batch norm that stays.

    `jt.optim.freeze(optax.adam(1e-4), jt.optim.batch_norms(params, state))`: statistics, scales and biases stay, and
    the layers normalise by the statistics, as is usual where batches are small.

    Args:
      params: by model name.
      state: the statistics, likewise.

    Raises:
      InputError: for such a layer without parameters, which nothing can tell to stay.
    """
    found: dict[str, None] = {}
    for name in params:
        for kind in state.get(name, {}):
            layers = (path.rpartition("/")[0] for path in tree.leaves_by_path(state[name][kind]))
            found |= dict.fromkeys(f"{name}/{layer}" for layer in layers)
    paths = [path.rpartition("/")[0] for path in tree.leaves_by_path(params)]
    if bare := next((layer for layer in found if layer not in paths), None):
        raise InputError(
            f"layer {bare!r} keeps statistics and has no parameters by which it could be frozen; give it a scale or a "
            f"bias, or train model.inference()"
        )
    return tuple(re.escape(layer) for layer in found)


def kernels(params: Any, *, patterns: tree.Patterns = ("kernel", "weight", "w")) -> Any:
    """Returns the mask of what weight decay is for: a tree of bools, true for the matrices that layers multiply by.

    Those are leaves of two axes or more that are called `kernel` (Flax), `weight` (PyTorch, Equinox) or `w` (Haiku).
    Biases, scales of norms, class tokens, positions, learned temperatures, prototypes and learned rates of an inner
    loop are not. As in timm and big_vision; LARS leaves the others unscaled, too.

    `optax.adamw(1e-3, weight_decay=0.05, mask=jt.optim.kernels)`.

    Args:
      params: any tree of parameters.
      patterns: path patterns of the names that count.
    """

    def decays(path, leaf):
        *above, name = tree.path_of(path).split("/")
        return "rates" not in above and jnp.ndim(leaf) > 1 and tree.matches(name, patterns)

    return jax.tree_util.tree_map_with_path(decays, params)


def scale_rate(optimizer: Optimizer, factor: float, patterns: tree.Patterns) -> Optimizer:
    """Multiplies the updates of the parameters that the patterns select, if any: a head that learns faster."""

    def selected(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: tree.matches(tree.path_of(path), patterns), params)

    return optax.chain(optimizer, optax.masked(optax.scale(factor), selected))


def layerwise_decay(optimizer: Optimizer, stages: Sequence[str], *, decay: float) -> Optimizer:
    """Scales the update of stage s by decay^(S − 1 − s): the head learns at the full rate, the first layer slowest.

    (Howard & Ruder 2018, arXiv:1801.06146, "discriminative fine-tuning"; Clark et al. 2020, arXiv:2003.10555.)

    Args:
      optimizer: whose updates are scaled.
      stages: path patterns from the input to the head, that cover every parameter: `model.stages`.
      decay: in (0, 1].

    Returns:
      An optimiser.
    """
    if not 0 < decay <= 1:
        raise InputError(f"decay must be in (0, 1]; got {decay}")
    rates = {pattern: decay ** (len(stages) - 1 - depth) for depth, pattern in enumerate(stages)}
    return optax.chain(optimizer, by_path({pattern: optax.scale(rate) for pattern, rate in rates.items()}))


def gradual_unfreeze(
    optimizer: Optimizer, stages: Sequence[str], *, every: int, adapt_statistics: bool = False
) -> Optimizer:
    """Trains the last stage first and one more, from the head downwards, after each `every` steps.

    (Howard & Ruder 2018, arXiv:1801.06146.) A stage's optimiser state starts when it is unfrozen; until then its
    layers run in inference mode.

    Args:
      optimizer: trains each stage once it is unfrozen.
      stages: path patterns from the input to the head, that cover every parameter: `model.stages`.
      every: steps between two unfreezings.
      adapt_statistics: as for `freeze`.

    Returns:
      An optimiser.
    """
    if every < 1:
        raise InputError(f"every must be at least one step; got {every}")

    def from_step(begin: int) -> Optimizer:
        if begin == 0:
            return optimizer
        later = optax.conditionally_mask(taking(optimizer), lambda step, **_: jnp.greater_equal(step, begin))
        return later if adapt_statistics else _still_until(later, begin)

    return _by_path({pattern: from_step((len(stages) - 1 - depth) * every) for depth, pattern in enumerate(stages)})


def _still_until(later: Optimizer, begin: int) -> Optimizer:
    """Returns `optax.conditionally_mask` with a state that names what does not move before update `begin`."""

    def init(params) -> Any:
        masked: Any = later.init(params)
        return Still(tuple(tree.leaves_by_path(params)), begin, masked.step, masked.inner_state)

    def update(updates, state, params=None, **extra):
        masked: Any = optax.ConditionallyMaskState(step=state.step, inner_state=state.inner_state)
        updates, masked = later.update(updates, masked, params, **extra)
        return updates, dataclasses.replace(state, step=masked.step, inner_state=masked.inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class Lookahead(NamedTuple):
    """The state of `lookahead`: updates since the weights met, the slow weights, the state of the inner optimiser."""

    count: Any
    slow: Any
    inner_state: Any


def lookahead(optimizer: Optimizer, *, every: int = 5, alpha: float = 0.5) -> Optimizer:
    """Lets slow weights follow fast ones: after each k updates s ← s + α (w − s), and w ← s.

    (Zhang et al. 2019, arXiv:1907.08610.) The fast weights w are the run's; between two meetings they are the inner
    optimiser's alone, whose state goes on; around an `optax.MultiSteps` updates count, not the batches that it
    accumulates. So weights are best read after a multiple of k updates. It takes no pairs of parameters, as
    `optax.lookahead` does: the slow weights are part of its state, in at least float32.

    Args:
      optimizer: makes the fast updates.
      every: k.
      alpha: α in [0, 1].

    Returns:
      An optimiser.

    Raises:
      InputError: for a k below 1, and another α.
    """
    if every < 1 or not 0 <= alpha <= 1:
        raise InputError(f"lookahead takes every of 1 or more and alpha in [0, 1]; got {every} and {alpha}")
    inner = taking(optimizer)

    def init(params) -> Any:
        def copied(leaf):
            return jnp.array(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32), copy=True)

        return Lookahead(jnp.zeros((), jnp.int32), jax.tree.map(copied, params), inner.init(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise InputError("lookahead needs the parameters: optimizer.update(grads, state, params)")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        updated = _updated(state.inner_state, inner_state)
        count = jnp.where(updated, (state.count + 1) % every, state.count)
        meet = updated & (count == 0)

        def followed(slow, param, change):
            return jnp.where(meet, slow + alpha * (param + change.astype(slow.dtype) - slow), slow)

        def met(slow, param, change):
            return jnp.where(meet, slow - param, change.astype(slow.dtype)).astype(change.dtype)

        slow = jax.tree.map(followed, state.slow, params, updates)
        return jax.tree.map(met, slow, params, updates), Lookahead(count, slow, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _updated(before: Any, after: Any) -> Any:
    """Returns whether an optimiser's step made an update: it doesn't while an accumulation in it waits for batches."""

    def counts(state):
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.MultiStepsState))
        return [node.gradient_step for node in nodes if isinstance(node, optax.MultiStepsState)]

    changed = [new != old for new, old in zip(counts(after), counts(before), strict=True)]
    return functools.reduce(jnp.logical_or, changed) if changed else jnp.array(True)
