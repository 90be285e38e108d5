"""Updates that alternate: several objectives, each with an optimiser of its own, one after the other on one batch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Objective
from jaxtransfer.terms import Terms, result_of
from jaxtransfer.train.arguments import check_objective, check_optimizer
from jaxtransfer.train.updates import updates_made


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """One update of a step: what it lowers, and by which optimiser. See `jt.alternate`.

    Attributes:
      name: of its metrics `<name>/...` and of its optimiser's state.
      objective: what it lowers; of the parameters it moves those of the models that this trains.
      optimizer: any optax transformation; `jt.optim.only(optimizer, "critic")` leaves it fewer of them.
      repeat: how many updates it makes in a row.
    """

    name: str
    objective: Objective
    optimizer: optax.GradientTransformation
    repeat: int = 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inner_state"], meta_fields=["names"])
@dataclasses.dataclass(frozen=True, eq=False)
class TurnState:
    """The state of a turn's optimiser.

    Attributes:
      names: the entries of the parameters that it moves.
      inner_state: the optimiser's.
    """

    names: tuple[str, ...]
    inner_state: Any


class Alternating(optax.GradientTransformationExtraArgs):
    """The optimiser that `jt.alternate` gives: it holds the turns, and the objective that belongs to them."""

    turns: tuple[Turn, ...]
    objective: Objective


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum(Terms):
    """The sum of the objectives of all turns, which may keep the same things."""

    turns: tuple[Turn, ...] = ()

    def values(self, outputs, params, state, batch, ctx):
        """Returns the weighted loss of each term; schedules are told the updates of their own turn."""
        values, metrics, rest = [], {}, self.parts
        for turn in self.turns:
            count = len(turn.objective.summed.parts)
            own, rest = Terms(rest[:count]), rest[count:]
            at_turn = dataclasses.replace(ctx, step=ctx.steps.get(turn.name, ctx.step))
            more, state, told = own.values(outputs, params, state, batch, at_turn)
            values, metrics = values + more, {**metrics, **told}
        return values, state, metrics

    def setup(self, key: jax.Array, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Returns what the turns keep besides their models; what two of them keep under one name is one thing."""
        kept: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for turn in self.turns:
            for known, more in zip(kept, turn.objective.setup(key, batch), strict=True):
                for name in known.keys() & more.keys():
                    if any(tree.differences(*(tree.leaves_by_path(own[name]) for own in (known, more)))):
                        raise InputError(f"two turns keep {name!r}, and not the same; give one of them another name")
                known |= {name: value for name, value in more.items() if name not in known}
        return kept


def alternate(*turns: Turn) -> tuple[Objective, optax.GradientTransformation]:
    """Makes each step several updates, one after the other on the same batch: adversaries, or a critic and its actor.

        fit = jt.Turn("fit", classify, optax.adam(1e-3))
        apart = jt.Turn("apart", classify - discrepancy, jt.optim.only(optax.adam(1e-3), "f1|f2"))
        near = jt.Turn("near", discrepancy, jt.optim.only(optax.adam(1e-3), "encoder"), repeat=4)
        objective, optimizer = jt.alternate(fit, apart, near)
        jt.fit(objective, optimizer, data, steps=1000)

    One compiled step makes them all. A turn sees the parameters and the model state that the one before it left; it
    moves the parameters of the models that its objective trains, as far as its optimiser does (`jt.optim.only`, in
    which the rest runs in inference mode). Its optimiser has a state of its own, which counts its own updates under
    accumulation. Its draws differ by turn and repetition. A moving average follows at the beginning of each update that
    runs it. The step counts batches, not updates.

    Metrics are those of the turns under `<name>/`, and `<name>/loss`, of a turn's last repetition; `loss` is the sum of
    the latter. In evaluation the objective is the sum of all, each under the same names.

    Args:
      *turns: in their order. Models of one name are one object in all of them.

    Returns:
      An objective and an optimiser that belong together, for `jt.init`, `jt.train_step` and `jt.fit`.

    Raises:
      InputError: for turns without a name of their own, or that repeat less than once; later where the objective or the
        optimiser is changed or given to something else.
    """
    for turn in turns:
        if not isinstance(turn, Turn):
            raise InputError(
                f"alternate takes turns, jt.Turn(name, objective, optimizer); got a {type(turn).__name__}. What is "
                f"made anew from all data comes between steps: jt.fit(..., refresh=jt.Refresh(every, fn))"
            )
        check_objective(turn.objective)
        check_optimizer(turn.optimizer)
        if isinstance(turn.optimizer, Alternating):
            raise InputError(f"turn {turn.name!r} alternates itself; list its turns among the others")
        if turn.repeat < 1 or int(turn.repeat) != turn.repeat:
            raise InputError(f"turn {turn.name!r} must repeat a positive whole number of times; got {turn.repeat}")
    names = [turn.name for turn in turns]
    if not turns or not all(names) or len(set(names)) < len(names):
        raise InputError(f"expected one turn or more, each with a name of its own; got {names}")
    if apart := [name for name in names if "/" in name]:
        raise InputError(f"the name of a turn stands before a '/' in metrics and has none itself; got {apart[0]!r}")
    objectives = [turn.objective for turn in turns]
    _check_memories(objectives)
    total = _Sum(tuple(part for turn in turns for part in _told(turn)), turns)
    trained = {model for objective in objectives for model in objective.trained}
    objective = Objective(
        name="",
        forwards=tuple(forward for one in objectives for forward in one.forwards),
        loss=total,
        setup=total.setup,
        check=total.check,
        frozen=tuple(handle for one in objectives for handle in one.frozen),
        models=tuple(model for one in objectives for model in one.models),
        peers=tuple(model for one in objectives for model in one.peers if model not in trained),
        per_update=tuple(entry for one in objectives for entry in one.per_update),
        kept=tuple(average for one in objectives for average in one.kept),
        apart=max((one.apart for one in objectives if one.apart is not None), default=None),
    )

    def no_init(params):
        raise InputError("turns have an optimiser each, and begin by jt.init(objective, optimizer, key, batch)")

    def no_update(updates, state, params=None, **extra):
        raise InputError("turns have an optimiser each: change those, not the one that jt.alternate gives")

    optimizer = Alternating(no_init, no_update)
    optimizer.turns, optimizer.objective = turns, objective
    return objective, optimizer


def _check_memories(objectives: list[Objective]) -> None:
    """Raises where the rules of two balances would remember in one place."""
    known: dict[str, Any] = {}
    for mixing in (term.task.mixing for one in objectives for _, term in one.summed.parts if term.task is not None):
        if mixing.remembers and known.setdefault(mixing.name, mixing) is not mixing:
            raise InputError(
                f"two balances keep what their rules remember as {mixing.name!r}; call one of them otherwise: "
                f"jt.balance(..., name='other')"
            )


def _told(turn: Turn) -> Any:
    """Returns the parts of a turn's sum, with their metrics under its name."""

    def renamed(term: Objective) -> Objective:
        def loss(outputs, params, state, batch, ctx):
            if ctx.train:  # the turns train by their own objectives; this one is scaled, added or given to another
                raise InputError(
                    "the objective of turns trains as jt.alternate gave it alone: change, scale or add to the "
                    "objectives of the turns, and alternate these"
                )
            value, state, metrics = result_of(term, outputs, params, state, batch, ctx)
            return value, state, {f"{turn.name}/{name}": mean for name, mean in metrics.items()}

        return dataclasses.replace(term, name=f"{turn.name}/{term.name}" if term.name else "", loss=loss)

    return turn.objective.summed.each(renamed).parts


def turns_of(objective: Objective, optimizer: optax.GradientTransformation) -> tuple[Turn, ...]:
    """Returns the updates that a step makes: those that alternate, else a single one without a name.

    Raises:
      InputError: for an objective and an optimiser of which only one is from `jt.alternate`, or of two of them.
    """
    alternates = isinstance(getattr(objective.loss, "turns", None), tuple)
    if not isinstance(optimizer, Alternating):
        if alternates:
            raise InputError("the objective is one of turns, which need the optimiser that jt.alternate gave with it")
        return (Turn("", objective, optimizer),)
    if optimizer.objective is not objective:
        raise InputError(
            "the optimiser is one of turns, and the objective isn't the one that jt.alternate gave with it: add terms "
            "to the objectives of the turns"
        )
    return optimizer.turns


def first_states(
    turns: tuple[Turn, ...], params: Any, key: jax.Array, batch: Batch, where: Callable[[Any], Any] = lambda _: None
) -> Any:
    """Returns the first state of the optimisers: that of the only one, or those of the turns by name.

    Args:
      turns: with the optimisers.
      params: of all models.
      key: of the run.
      batch: an example.
      where: gives the shardings of a tree of shapes, or None, as it comes.
    """

    def begun(turn: Turn, params: Any) -> Any:
        shardings = where(jax.eval_shape(turn.optimizer.init, params))
        return jax.jit(turn.optimizer.init, out_shardings=shardings)(params)

    if turns[0].name == "":
        return begun(turns[0], params)

    def own(turn: Turn) -> TurnState:
        alone = dataclasses.replace(turn.objective, peers=())  # others train them
        made = jax.eval_shape(lambda key: alone.init(key, batch)[0], key)
        taught = {model.name for model in turn.objective.peers}
        names = tuple(sorted(name for name in made if name not in taught))
        if not names:
            raise InputError(
                f"turn {turn.name!r} would move nothing: its objective trains no model. A penalty goes beside the "
                f"terms that it is for, in their turn: jt.classification(model) + jt.l2()"
            )
        return TurnState(names, begun(turn, {name: params[name] for name in names}))

    return {turn.name: own(turn) for turn in turns}


def steps_of(opt_state: Any, step: Any) -> dict[str, Any]:
    """Returns the updates that each turn has made in `step` batches, by name; none where nothing alternates."""
    turns = opt_state if isinstance(opt_state, dict) else {}
    return {name: updates_made(step, own) for name, own in turns.items() if isinstance(own, TurnState)}


def moved_by(turn: Turn, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """Returns the parameters that a turn moves, and the state of its own optimiser."""
    if turn.name == "":
        return params, opt_state
    own = opt_state[turn.name]
    return {name: params[name] for name in own.names}, own.inner_state


def kept_by(turn: Turn, opt_state: Any, new: Any) -> Any:
    """Returns the state of the optimisers with that of a turn's own."""
    if turn.name == "":
        return new
    return {**opt_state, turn.name: dataclasses.replace(opt_state[turn.name], inner_state=new)}
