"""What a run is: the facts that determine its weights, noted where it lies and compared before it goes on."""

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.devices.parts import is_split
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Context, Objective
from jaxtransfer.optim import held_still
from jaxtransfer.parts.extra_arguments import as_told, taking, update_by
from jaxtransfer.runs.directory import NOTE
from jaxtransfer.runs.files import told, write_atomically
from jaxtransfer.train.fingerprint import of_program, of_tree, same
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.turns import Turn, moved_by, turns_of

_FORMAT = 1
_PROGRAMS = ("objective", "optimizer", "transform", "sample")
_SHOWN = 40  # characters; a longer value is a digest
_OF_DATA = (
    "data",
    "split",
    "examples",
    "image_shape",
    "resizing",
    "class_names",
    "labels",
    "images",
    "records",
    "rows",
    "arrays",
)
_FOLLOWS = {  # what differs along with something else, and is not worth a word of its own then
    "seed": ("starting weights",),
    "batch size": ("objective", "transform", "sample", "first batch"),
    **dict.fromkeys(_OF_DATA, ("augmentation",)),
}


def of_data(data: Any, first: Batch) -> dict[str, Any]:
    """Returns what the batches are, by part: what the data say of themselves, or else what their first batch is."""
    describe = getattr(data, "fingerprint", None)
    rows = {"batch size": int(jax.tree.leaves(first)[0].shape[0])}
    if callable(describe):
        told: Any = describe()
        return {**rows, **(told if isinstance(told, Mapping) else {"data": told}), "first batch": None}
    return {**rows, "first batch": of_tree(first)}


def of_draws(sample: Callable, key: jax.Array, data: Any, first: Batch) -> dict[str, Any]:
    """Returns what the batches are that a function draws inside the step, by part."""
    rows = int(jax.tree.leaves(first)[0].shape[0])
    return {"batch size": rows, "data": of_tree(data), "sample": of_program(sample, key, data)}


def of_transform(transform: Callable | None, key: jax.Array, batch: Batch) -> dict[str, Any]:
    """Returns what changes the batches inside the step."""
    rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
    return {"transform": None if transform is None else of_program(transform, key, dict(batch), rows)}


def of_evaluation(data: Any) -> Any:
    """Returns what the data of the evaluations are, where that can be told without reading them; else None."""
    describe = getattr(data, "fingerprint", None)
    if callable(describe):
        return describe()
    return [len(data), of_tree(data[0])] if isinstance(data, Sequence) and len(data) else None


def of_training(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    start: TrainState,
    batch: Batch,
    *,
    given: bool,
    arrays: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what is trained and how, by part: programs are told apart by their traces, weights by their values.

    Args:
      objective: what is minimised.
      optimizer: by what.
      start: the state at step 0.
      batch: one as the objective sees it.
      given: whether the caller gave weights to start from.
      arrays: what `of_arrays` tells of them, where that is known already.
    """
    turns = turns_of(objective, optimizer)
    frozen = [handle.tree for handle in objective.frozen]
    programs = [_of_turn(turn, objective, start, batch, frozen) for turn in turns]
    lowered, optimised = programs[0]
    if turns[0].name:
        order = [[turn.name, turn.repeat] for turn in turns]
        lowered, optimised = ([order, list(parts)] for parts in zip(*programs, strict=True))
    return {
        "seed": [str(jax.random.key_impl(start.key)), *jax.random.key_data(start.key).ravel().tolist()],
        "objective": lowered,
        "optimizer": optimised,
        "starting weights given": given,
        **(of_arrays(objective, start) if arrays is None else arrays),
    }


def of_split(objective: Objective, start: TrainState) -> dict[str, Any] | None:
    """Returns what tells the arrays of a start from others where some are split over processes, which ask at once."""
    held = start, [handle.tree for handle in objective.frozen]
    return of_arrays(objective, start) if any(map(is_split, jax.tree.leaves(held))) else None


def of_arrays(objective: Objective, start: TrainState) -> dict[str, Any]:
    """Returns what tells weights, model state and frozen trees from others."""
    frozen = [handle.tree for handle in objective.frozen]
    return {
        "starting weights": of_tree({"params": start.params, "state": start.state}),
        "frozen weights": of_tree(frozen),
    }


def _of_turn(turn: Turn, whole: Objective, start: TrainState, batch: Batch, frozen: list[Any]) -> tuple[Any, Any]:
    """Returns what tells an update from others: the programs of what it lowers, and of its optimiser."""
    own, opt_state = moved_by(turn, start.opt_state, start.params)
    optimizer = taking(turn.optimizer)
    still = held_still(opt_state, own)  # which layers the optimiser has run in inference mode

    def loss(params, state, batch, step, key, frozen):
        read = dict(zip(whole.frozen, frozen, strict=True))
        return turn.objective(params, state, batch, Context(step, key, read, still=still))

    def optimise(params, value):
        state = optimizer.init(params)  # the numbers that it keeps there count too
        return state, update_by(optimizer, params, state, params, as_told(params, value))  # the loss is told of beside

    lowered = of_program(loss, start.params, start.state, dict(batch), start.step, start.key, frozen)
    return lowered, of_program(optimise, own, jnp.zeros(()))


def environment() -> dict[str, Any]:
    """Returns what programs are traced by: under another version or on another platform one looks otherwise."""
    found: dict[str, Any] = {
        "platform": jax.default_backend(),
        "jit": not getattr(jax.config, "jax_disable_jit", False),
    }
    for name in ("jax", "flax", "optax", "jaxtransfer"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


class Identity:
    """The note of what a run is.

    Args:
      directory: of the run.
      parts: the facts by name, as the functions above give them.
      steps: updates in all.
      periods: of its records; they may change from call to call.

    Attributes:
      same_periods: after `compare`, whether all calls so far had these periods.
    """

    def __init__(self, directory: Path, parts: Mapping[str, Any], steps: int, periods: Sequence[Any] = ()):
        self.path, self.steps = directory / NOTE, steps
        self.parts = json.loads(json.dumps(parts, default=str))
        self.environment = environment()
        self._periods = list(periods)
        self.same_periods = True

    def compare(self, done: int) -> list[str]:
        """Compares with the run that lies there, and returns what to tell of it, a line each.

        Args:
          done: the step that the run is at; one that has no checkpoint yet may be begun anew in any way.

        Raises:
          InputError: names what the run there has otherwise.
        """
        if not done:
            return []
        old = self._read()
        self.same_periods = old is not None and old.get("periods") == self._periods
        if old is None:
            spoiled = f"{self.path} can't be read: nothing tells whether {self.path.parent} is a run of the same data,"
            return [f"{spoiled} weights, objective and optimizer"] if self.path.exists() else []
        lines = []
        alike = old.get("environment") == self.environment
        if not alike:
            before, now = (_versions(one) for one in (old.get("environment") or {}, self.environment))
            lines.append(
                f"{self.path.parent} was begun under {before or 'other versions'}, this is {now or 'another'}: its "
                f"objective and optimizer can't be compared with these"
            )
        there = old.get("parts", {})
        changed = [name for name in self._compared(old, alike) if not same(there.get(name), self.parts.get(name))]
        if None in (
            there.get("evaluation data"),
            self.parts.get("evaluation data"),
        ):  # an iterable says nothing of itself
            changed = [name for name in changed if name != "evaluation data"]
        if changed == ["evaluation data"]:
            lines.append(
                f"{self.path.parent} was evaluated on other data so far: the best step and the patience compare both"
            )
        elif changed:
            self._refuse(there, [name for name in changed if name != "evaluation data"], old["steps"])
        if self.steps < done:
            raise InputError(
                f"{self.path.parent} is at step {done} of {old['steps']}; got steps={self.steps}. Ask for more, or "
                f"choose another --out"
            )
        return lines

    def write(self) -> None:
        """Notes the facts, where they aren't noted yet."""
        note = {
            "format": _FORMAT,
            "steps": self.steps,
            "environment": self.environment,
            "periods": self._periods if self.same_periods else None,
        }
        text = json.dumps({**note, "parts": self.parts}, indent=1) + "\n"
        with told(self.path):
            if not self.path.exists() or self.path.read_text(errors="replace") != text:
                write_atomically(self.path, text)

    def _read(self) -> dict[str, Any] | None:
        """Returns the note, or None where there is none that can be read: of a run of long ago, or spoiled."""
        try:
            note = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        known = isinstance(note, dict) and isinstance(note.get("parts"), dict) and isinstance(note.get("steps"), int)
        return note if known else None

    def _compared(self, old: Mapping[str, Any], alike: bool) -> list[str]:
        there = old["parts"]
        names = there.keys() & self.parts.keys() if old.get("format") != _FORMAT else there.keys() | self.parts.keys()
        both_given = there.get("starting weights given") and self.parts.get("starting weights given")
        left_out = set() if alike else {*_PROGRAMS, *(() if both_given else ("starting weights",))}
        order = [*self.parts, *sorted(there)]
        return [name for name in dict.fromkeys(order) if name in names - left_out - {"starting weights given"}]

    def _refuse(self, there: Mapping[str, Any], changed: list[str], steps: int) -> None:
        run = self.path.parent
        if self.steps != steps and set(changed) <= set(_PROGRAMS):
            what = " and ".join(changed)
            raise InputError(
                f"{run} is a run of {steps} steps, and got steps={self.steps} with another {what}: a schedule over "
                f"all steps (a cosine, say) is another one for {self.steps}, and that of the run has ended. Repeat it "
                f"with steps={steps}, or begin a new run from its weights in another --out (params=, finetune --from)"
            )
        follows = {name for cause in changed for name in _following(cause)}
        listed = [_told(name, there.get(name), self.parts.get(name)) for name in changed if name not in follows]
        if self.steps != steps:
            listed.append(f"steps: {steps} there, {self.steps} now")
        if "first batch" in changed and "first batch" not in follows:
            listed[-1] += " (batch i must depend on i alone; data may say what they are by a method fingerprint())"
        raise InputError(
            f"{run} holds a run of another configuration ({'; '.join(listed)}); repeat that one's command to resume "
            f"it, or choose another --out"
        )


def _following(cause: str) -> set[str]:
    """Returns what differs along with a part; of zipped data, "source/labels" say, also the part's own."""
    prefix, slash, name = cause.rpartition("/")
    found = set(_FOLLOWS.get(name, ()))
    return found | {f"{prefix}{slash}{other}" for other in found}


def _told(name: str, old: Any, new: Any) -> str:
    texts = [
        " ".join(map(str, value[1:])).removeprefix("0 ") if name == "seed" and value else str(value)
        for value in (old, new)
    ]
    if any(isinstance(value, Mapping) for value in (old, new)) or max(map(len, texts)) > _SHOWN:
        return name
    return f"{name}: {texts[0]} there, {texts[1]} now"


def _versions(environment: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in environment.items() if name != "jit" and value)
