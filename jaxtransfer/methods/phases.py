"""Training in several phases, each from the weights that the one before reached: LP-FT, born-again networks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import optax

from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Objective
from jaxtransfer.runs.directory import CONFIG, open_run
from jaxtransfer.train import Fitted, fit


class Phase(NamedTuple):
    """One training run of a method.

    Attributes:
      name: of the phase.
      objective: what it minimises; or a function that makes it from what the phase before reached, `(params, state)`.
      optimizer: what it minimises it with.
      share: its share of the method's steps.
      fresh: whether it starts from new weights, not from those of the phase before.
    """

    name: str
    objective: Objective | Callable[[Any, Any], Objective]
    optimizer: optax.GradientTransformation
    share: float = 1.0
    fresh: bool = False

    def objective_after(self, params: Any, state: Any) -> Objective:
        """Returns the objective, given what the phase before reached."""
        return self.objective if isinstance(self.objective, Objective) else self.objective(params, state)


def split_steps(steps: int, shares: Sequence[float]) -> list[int]:
    """Returns whole numbers of steps, at least one each, that add up to `steps` in proportion to the shares.

    Args:
      steps: in all.
      shares: positive, of each phase.

    Raises:
      InputError: for fewer steps than phases.
    """
    if steps < len(shares):
        raise InputError(f"the method has {len(shares)} phases and needs as many steps; got steps={steps}")
    bounds, total = [0], sum(shares)
    for number in range(1, len(shares) + 1):
        ideal = round(steps * sum(shares[:number]) / total)
        bounds.append(min(max(ideal, bounds[-1] + 1), steps - (len(shares) - number)))
    return [after - before for before, after in pairwise(bounds)]


def train_phases(
    phases: Sequence[Phase],
    data: Any,
    *,
    steps: int,
    key: int = 0,
    params: Any = None,
    state: Any = None,
    out: str | Path | None = None,
    log: Callable[[str, dict[str, Any]], None] | None = None,
    after: Callable[[Phase, Any, Fitted], None] | None = None,
    **options: Any,
) -> Fitted:
    """Trains each phase from the weights of the one before; with `out`, phases that are done are not repeated.

    The data go on where the phase before ended. The last phase's records lie in `out` itself, an earlier one's in a
    folder of it, `stage-1-<name>`.

    Args:
      phases: what a method gives, `jt.methods.lp_ft(...)` say.
      data: batches with `iterate(start)` and `fingerprint()`, such as `jt.data.pipeline` gives.
      steps: in all; each phase has its share.
      key: a seed; a phase that starts afresh has the next one.
      params: weights that the first phase starts from, by model name.
      state: batch statistics likewise.
      out: the run directory.
      log: called with a phase's name, empty where there is one phase, and each record of it.
      after: called after each phase, before the next one begins, with the phase, its directory (None without `out`)
        and what came out.
      **options: further arguments of `jt.fit`, the same for all phases.

    Returns:
      What the last phase came to.

    Raises:
      InputError: for fewer steps than phases, and as `jt.fit`.
    """
    if not (hasattr(data, "iterate") and hasattr(data, "fingerprint")):
        raise InputError(
            f"train_phases takes batches with iterate(start) and fingerprint(), got a {type(data).__name__}: "
            f"jt.data.pipeline(dataset, batch_size) makes them"
        )
    parts = split_steps(steps, [phase.share for phase in phases])
    out = None if options.get("dry_run") else out
    config = {"steps": steps, **(options.pop("config", None) or {})}
    if out is not None and not (Path(out) / CONFIG).exists():  # or the last phase would find a foreign folder there
        with open_run(out, config):
            pass
    if options.get("model") is not None:
        options.setdefault("dataset", getattr(data, "dataset", None))
    first, fitted = 0, None
    for number, (phase, own_steps) in enumerate(zip(phases, parts, strict=True), 1):
        earlier = "" if number == len(phases) else f"stage-{number}-{phase.name}"
        name = phase.name if len(phases) > 1 else ""
        directory = None if out is None else Path(out) / earlier
        fitted = fit(
            phase.objective_after(params, state),
            phase.optimizer,
            _From(data, first),
            steps=own_steps,
            key=key + number - 1 if phase.fresh else key,
            params=None if phase.fresh else params,
            state=None if phase.fresh else state,
            out=directory,
            log=None if log is None else _named(log, name),
            config=config,
            **options,
        )
        params, state, first = fitted.state.params, fitted.state.state, first + own_steps
        if after is not None:
            after(phase, directory, fitted)
    if fitted is None:
        raise InputError("train_phases needs one phase or more; got none")
    return fitted


def _named(log: Callable[[str, dict[str, Any]], None], name: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: log(name, record)


class _From:
    """The batches of a pipeline from a position on: a later phase reads on where the one before ended."""

    def __init__(self, batches: Any, first: int):
        self.batches, self.first = batches, first

    def iterate(self, start: int) -> Iterator[Batch]:
        return self.batches.iterate(self.first + start)

    def fingerprint(self) -> dict[str, Any]:
        return {**self.batches.fingerprint(), "first batch of the stage": self.first}
