"""Where a student's targets come from: a teacher that is frozen, trained elsewhere, averaged, or cached."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Average, Forward, FrozenModel
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch
from jaxtransfer.parts.outputs import Tap, pick
from jaxtransfer.weights import is_fixed


@dataclasses.dataclass(frozen=True)
class Cached:
    """A teacher whose outputs come with the batch, `logits` as `batch["teacher_logits"]`; made by `cached`."""

    name: str = "teacher"

    def outputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the outputs that the batch holds, by name."""
        prefix = f"{self.name}_"
        return {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}


def cached(name: str = "teacher") -> Cached:
    """Returns the teacher whose outputs the data bring along: see `jt.data.attach_outputs`.

    Args:
      name: the prefix of its entries in the batch, `teacher_logits` say.
    """
    return Cached(name)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model that trains in another term of the sum; made by `peer`."""

    model: Model

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name


def peer(model: Model) -> Peer:
    """Returns a model that trains in another term as a teacher: its outputs are targets, no gradient flows into it.

    At init it is an error (`InputError`) where no term of the sum trains it.
    """
    return Peer(model)


Teacher = FrozenModel | Peer | Average | Cached


@dataclasses.dataclass(frozen=True)
class Source:
    """A teacher on a view of the batch.

    Attributes:
      name: for messages and for the names of adapters.
      forward: the run whose outputs teach; None where the batch holds them.
      cache: the entries of the batch that teach, where no forward does.
    """

    name: str
    forward: Forward | None = None
    cache: Cached | None = None

    @classmethod
    def of(cls, teacher: Teacher, view: str) -> "Source":
        """Returns the source of a teacher of any kind.

        Raises:
          InputError: for anything else, variables or a bare function say.
        """
        if isinstance(teacher, Cached):
            return cls(teacher.name, cache=teacher)
        model = teacher.model if isinstance(teacher, Peer) else teacher
        if model is teacher and not is_fixed(teacher):
            raise InputError(
                f"expected a teacher: jt.frozen(model, variables), jt.ema(model), jt.cached(), or jt.peer(model), "
                f"which trains in another term; got {type(teacher).__name__}"
            )
        forward = Forward.of(model, view)
        return cls(forward.weights.name, forward)

    def outputs(self, outputs: Mapping[Forward, Any], batch: Batch) -> Mapping[str, Any]:
        """Returns the teacher's outputs by name."""
        if self.cache is not None:
            return self.cache.outputs(batch)
        assert self.forward is not None
        return outputs[self.forward]

    def pick(self, outputs: Mapping[str, Any], tap: Tap) -> Any:
        """Returns the output called `tap`, or a tuple of them.

        Raises:
          InputError: for a name that isn't there; lists those that are.
        """
        if self.cache is not None and not outputs:
            raise InputError(
                f"the batch has no entry that begins with {self.name + '_'!r}: attach the teacher's cache to the data, "
                f"or give the teacher itself"
            )
        names = (tap,) if isinstance(tap, str) else tap
        if self.cache is not None and (missing := [name for name in names if name not in outputs]):
            raise InputError(
                f"the cache of {self.name!r} holds no {missing[0]!r}, but {', '.join(sorted(outputs))}; write it with "
                f"that output, too (cache-teacher --outputs), or give the teacher itself"
            )
        return pick(f"teacher {self.name!r}", outputs, tap)


def peers_of(teachers: Iterable[Teacher], student: Model) -> tuple[Model, ...]:
    """Returns the models that teach as peers, which other terms must train; the student trains itself."""
    return tuple(one.model for one in teachers if isinstance(one, Peer) and one.model is not student)
