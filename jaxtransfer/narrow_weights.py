"""Weights stored in fewer bits than their updates need: bfloat16 beside a float32 copy, or rounded at random."""

import zlib
from collections.abc import Iterator, Set
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.loss_scale import LossScaled
from jaxtransfer.parts.extra_arguments import taking

_NAMES = "master_weights and stochastic_rounding"
_LOW = 16  # bits of a float32 that bfloat16 lacks


class MasterWeights(NamedTuple):
    """The state of `master_weights`.

    Attributes:
      master: the weights in at least float32; of those that are stored so anyway an empty `optax.MaskedNode`.
      inner_state: of the optimiser that moves them.
    """

    master: Any
    inner_state: Any


class StochasticRounding(NamedTuple):
    """The state of `stochastic_rounding`.

    Attributes:
      count: updates asked for so far, int32 scalar.
      key: the data of the key, uint32.
      inner_state: of the optimiser whose updates are rounded.
    """

    count: Any
    key: Any
    inner_state: Any


def master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Moves a float32 copy of weights that are stored in fewer bits; what is stored is the copy, rounded.

    bfloat16 has 8 bits of precision: w + Δ is w where |Δ| < 2⁻⁹ |w|, and a training by small steps stands still. Here
    the optimiser sees the copy m in place of w, the gradient in its type, and keeps its own state in it: m ← m + Δ,
    w ← round(m). (Micikevicius et al. 2018, arXiv:1710.03740, §3.1.) The forward pass reads the stored w, in half of
    the memory and of the traffic; in all the optimiser holds 4 bytes more for each of them. The copy begins as the
    weights are stored, and is part of the optimiser's state, so of checkpoints. Weights in float32 or more, such as
    those of single layers, are moved as ever.

        model = jt.models.resnet18(10, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        optimizer = jt.optim.master_weights(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))

    Clipping, schedules, `optax.MultiSteps` (around it the mean of the gradients would be rounded), `jt.optim.freeze`,
    `layerwise_decay` and `lookahead` go inside of it, and `optax.contrib.sam`, whose search moves the copies;
    `jt.optim.loss_scaled` around it. Inside of `jt.optim.only`, `by_path` or at the end
    of an `optax.chain` it serves as well, and keeps no copies of what is frozen outside.

    Args:
      optimizer: makes the updates.

    Returns:
      An optimiser; its updates are float32, for `optax.apply_updates`, which rounds the sum to the type of the weights.

    Raises:
      InputError: for weights in 8 bits; where an update comes without the parameters; from `jt.init` where something
        stands around it that would change what it has rounded.
    """
    inner = taking(optimizer)

    def init(params) -> Any:
        def copied(leaf):
            return jnp.array(leaf, jnp.float32, copy=True) if _is_narrow(leaf.dtype) else optax.MaskedNode()

        for path, leaf in tree.leaves_by_path(params).items():
            if _is_narrow(leaf.dtype) and leaf.dtype not in (jnp.bfloat16, jnp.float16):
                raise InputError(
                    f"master_weights rounds to bfloat16 or float16, and {path!r} is {leaf.dtype}; freeze it"
                )
        master = jax.tree.map(copied, params)
        return MasterWeights(master, inner.init(_beside(params, master)))

    def update(updates, state, params=None, **extra):
        _check_given(params, "master_weights")
        before = _beside(params, jax.tree.map(_followed, params, state.master))
        changes, inner_state = inner.update(_widened(updates), state.inner_state, before, **_extra(extra))
        after = jax.tree.map(lambda m, change: (m + change).astype(m.dtype), before, changes)

        def of_master(param, copy, moved, change):
            if isinstance(copy, optax.MaskedNode):
                return change
            return _stored(moved, param.dtype) - param.astype(moved.dtype)

        told = jax.tree.map(of_master, params, state.master, after, changes)
        master = jax.tree.map(
            lambda _, copy, moved: copy if isinstance(copy, optax.MaskedNode) else moved, params, state.master, after
        )
        return told, MasterWeights(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_rounding(optimizer: optax.GradientTransformation, key: jax.Array | int) -> optax.GradientTransformation:
    """Rounds w + Δ to bfloat16 up or down at random, so that updates too small to be stored arrive on average.

    P(up) is how far w + Δ, which is computed in float32, lies between its two neighbours: the mean of what is stored is
    w + Δ. (Gupta et al. 2015, arXiv:1502.02551; for training in bfloat16 Zamirai et al. 2020, arXiv:2010.06192.) No
    copy is kept, as `master_weights` does; the noise of a step is up to one unit in the last of 8 bits. The optimiser
    sees weights and gradient in float32, and keeps its state in it; for moments in fewer bits tell it so
    (`optax.adam(..., mu_dtype=jnp.bfloat16)`). Weights in float32 or more are moved as ever.

    The draws of an update are `fold_in` of the key, the updates so far and the parameter's path: the same on all
    devices and in a run that goes on, and no other ones where a parameter is added. The key is part of the state. It is
    to be another than those that data and dropout draw by.

        optimizer = jt.optim.stochastic_rounding(optax.adamw(1e-3), key=1)

    What stands inside of it and around it: as for `master_weights`. Optimisers that measure how far the weights have
    come, such as `optax.contrib.prodigy`, need the copies of that: by the first tiny updates none comes anywhere here.

    Args:
      optimizer: makes the updates.
      key: a JAX key or a seed.

    Returns:
      An optimiser; its updates are float32, and such that `optax.apply_updates` gives the rounded weights.

    Raises:
      InputError: for a key that is none, and for weights in fewer bits than float32 that aren't bfloat16; where an
        update comes without the parameters; from `jt.init` where something stands around it that would change what it
        has rounded.
    """
    inner = taking(optimizer)
    data, kind = _key_data(key)

    def init(params) -> Any:
        for path, leaf in tree.leaves_by_path(params).items():
            dtype = jnp.result_type(leaf)
            if _is_narrow(dtype) and dtype != jnp.bfloat16:
                raise InputError(
                    f"stochastic_rounding rounds to bfloat16, and {path!r} is {dtype}; take jt.optim.master_weights"
                )
        return StochasticRounding(jnp.zeros((), jnp.int32), jnp.asarray(data), inner.init(_widened(params)))

    def update(updates, state, params=None, **extra):
        _check_given(params, "stochastic_rounding")
        wide = _widened(params)
        changes, inner_state = inner.update(_widened(updates), state.inner_state, wide, **_extra(extra))
        drawn = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=kind), state.count)

        def of_leaf(path, param, change):
            if not _is_narrow(param.dtype):
                return change
            own = jax.random.fold_in(drawn, zlib.crc32(tree.path_of(path).encode()))
            param = param.astype(jnp.float32)
            return _rounded(own, param + change) - param

        told = jax.tree_util.tree_map_with_path(of_leaf, params, changes)
        return told, StochasticRounding(optax.safe_increment(state.count), state.key, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _stored(values: jax.Array, dtype: Any) -> jax.Array:
    """Returns values as a narrower type holds them, still in their own."""
    info = jnp.finfo(dtype)
    # no cast, which XLA may take back: it is allowed to compute in more bits than it is asked for
    found = jax.lax.reduce_precision(values, info.nexp, info.nmant)
    if (least := float(info.smallest_normal)) == float(jnp.finfo(values.dtype).smallest_normal):
        return found
    unit = float(info.smallest_subnormal)  # of float16 below 6e-5, where it has numbers and reduce_precision gives 0
    return jnp.where(jnp.abs(values) < least, jnp.round(values / unit) * unit, found)


def _followed(param: Any, copy: Any) -> Any:
    """Returns the copy of a parameter, with what others have made of the parameter since: another turn, say.

    Where it is no longer what the copy was rounded to, the copy is that plus what rounding left over, as far as this
    still rounds to it.
    """
    if isinstance(copy, optax.MaskedNode):
        return copy
    wide = param.astype(copy.dtype)
    left = wide + (copy - _stored(copy, param.dtype))
    return jnp.where(_stored(left, param.dtype) == wide, left, wide)


def _rounded(key: jax.Array, values: jax.Array) -> jax.Array:
    """Returns float32 values rounded at random to those of bfloat16, still as float32.

    Neighbours of bfloat16 differ by one in the upper half of a float32's bits, across powers of two as well: to add
    any lower half, all alike, and cut it off goes up as often as it should.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    found = jax.lax.bitcast_convert_type((bits + noise) >> _LOW << _LOW, jnp.float32)
    return jnp.where(jnp.isfinite(values), found, values)  # infinity would become no number


def moves_badly(params: Any, opt_state: Any, still: Set[str]) -> str | None:
    """Returns the path of a parameter whose small updates are lost, if there is one: in few bits, and moved as it is.

    Args:
      params: by model name.
      opt_state: of the optimiser that moves them.
      still: paths of what it leaves as it is for ever.
    """
    ours = list(_found(opt_state))
    if any(isinstance(one, StochasticRounding) for one in ours):
        return None
    well = {path for one in ours for path in tree.leaves_by_path(one.master)} | still  # others may move beside them
    leaves = tree.leaves_by_path(params).items()
    return next((path for path, leaf in leaves if _is_narrow(leaf.dtype) and path not in well), None)


def check_stands(opt_state: Any) -> None:
    """Raises where what is rounded would be changed afterwards, or would not be what an optimiser around it thinks.

    Args:
      opt_state: the state of any optimiser.

    Raises:
      InputError: says where it may stand.
    """
    if isinstance(opt_state, MasterWeights | StochasticRounding):
        if any(_found(opt_state.inner_state)):
            raise InputError(f"{_NAMES}: one of them is enough, and there are two, one inside of the other")
        return
    if isinstance(opt_state, optax.MultiStepsState) and any(_found(opt_state.inner_opt_state)):
        for leaf in jax.tree.leaves(opt_state.acc_grads):
            if _is_narrow(leaf.dtype):
                raise InputError(
                    f"optax.MultiSteps around {_NAMES} sums gradients in {leaf.dtype}, where small ones are lost; "
                    f"leave its accumulator_dtype out"
                )
    inner, others = _around(opt_state)
    if any(found for other in others for found in _found(other)):
        raise InputError(
            f"{_NAMES} go around everything else but jt.optim.loss_scaled, only, freeze and by_path, or at the end of "
            f"an optax.chain: what would come after them changes the weights that they have rounded"
        )
    for one in inner:
        check_stands(one)


def _around(state: Any) -> tuple[list[Any], list[Any]]:
    """Returns the states in which rounding may stand, and the others, of what is around at one level."""
    if isinstance(state, optax.MultiStepsState):
        return [state.inner_opt_state], []
    if isinstance(state, optax.transforms.PartitionState):
        return list(state.inner_states.values()), []
    if isinstance(state, LossScaled | optax.MaskedState) or _is_injected(state):
        return [state.inner_state], []
    if type(state) is tuple and state:  # of optax.chain
        return [state[-1]], list(state[:-1])
    return [], [state]


def _is_injected(state: Any) -> bool:
    return isinstance(getattr(state, "hyperparams", None), dict) and hasattr(state, "inner_state")


def _found(state: Any) -> Iterator[Any]:
    def ours(node):
        return isinstance(node, MasterWeights | StochasticRounding)

    return filter(ours, jax.tree.leaves(state, is_leaf=ours))


def _beside(params: Any, master: Any) -> Any:
    """Returns the parameters, in place of those in few bits their copies."""
    return jax.tree.map(lambda param, copy: param if isinstance(copy, optax.MaskedNode) else copy, params, master)


def _extra(known: dict[str, Any]) -> dict[str, Any]:
    """Returns the extra arguments of an update, the gradient and what gives one as wide as the others."""
    wide = {"grad": _widened, "grad_fn": lambda given: lambda *arguments: _widened(given(*arguments))}
    return {name: wide[name](value) if name in wide else value for name, value in known.items()}


def _widened(values: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_narrow(leaf.dtype) else leaf, values)


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _check_given(params: Any, name: str) -> None:
    if params is None:
        raise InputError(f"{name} needs the parameters: optimizer.update(grads, state, params)")


def _key_data(given: Any) -> tuple[np.ndarray, Any]:
    """Returns the numbers of a key or a seed, and the kind of the key."""
    key: Any = given
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        with jax.ensure_compile_time_eval():  # an optimiser may be made inside of a traced function
            key = jax.random.key(key)
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    typed = bool(shape == () and dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key))
    old = dtype == np.uint32 and shape in ((2,), (4,))  # of jax.random.PRNGKey
    if not (typed or old):
        raise InputError(
            f"stochastic_rounding draws by a seed, such as 0, or one key, such as jax.random.key(0); got "
            f"{type(key).__name__ if dtype is None else f'{dtype}{list(shape or ())}'}"
        )
    with jax.ensure_compile_time_eval():
        key = cast(jax.Array, key)
        key = key if typed else jax.random.wrap_key_data(key)
        return np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
