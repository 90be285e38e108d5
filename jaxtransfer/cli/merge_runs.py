"""The runs that `merge` fuses: of one architecture, one preparation of inputs, and their classes in one order."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.sources import is_weights, network_of, read_source
from jaxtransfer.data.classes import match_classes
from jaxtransfer.errors import InputError
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.runs import checkpoints
from jaxtransfer.runs.deltas import BASE, DELTA, folded
from jaxtransfer.runs.directory import read_config
from jaxtransfer.runs.load import Run
from jaxtransfer.runs.table import TABLE
from jaxtransfer.runs.tokens import TOKENIZER

_INPUTS = {
    "image_shape": "images of another shape",
    "mean": "images normalised by another mean",
    "std": "images normalised by another deviation",
    TABLE: "columns that another table's rows were made into",
    TOKENIZER: "tokens of other words",
}
"""Entries of a configuration that say what a network's inputs are, and what another entry means."""


class Member(NamedTuple):
    """A run to fuse.

    Attributes:
      name: what it is called.
      run: as it was read.
      variables: its weights and statistics on the host, its head in the order of the first run's classes.
    """

    name: str
    run: Run
    variables: Any


def read_members(sources: Sequence[str], base: str | None, model: str | None) -> tuple[list[Member], Member | None]:
    """Returns the runs, and the base where there is one, checked to be of one kind.

    Args:
      sources: run directories, or weights in files.
      base: likewise, what they were fine-tuned from.
      model: the network that weights in files are of, where their names don't tell.

    Raises:
      InputError: for runs that can't be fused: another architecture, other inputs, other classes.
    """
    runs = [_read(source, model) for source in sources]
    names = _names(sources)
    first = Member(names[0], runs[0], _variables(runs[0]))
    members = [first, *(_alike(name, run, first) for name, run in zip(names[1:], runs[1:], strict=True))]
    return members, None if base is None else _alike(f"the base {base}", _read(base, model), first)


def read_deltas(sources: Sequence[str]) -> tuple[list[Member], Member | None]:
    """Returns deltas as runs of their base's network, each with its difference in the weights; of several the base too.

    Args:
      sources: the base's run, and those of deltas on it.

    Raises:
      InputError: for a run that is no delta of weights, and one on another base; for deltas of other classes.
    """
    bases, deltas = {}, []
    for source in sources[1:]:
        config = read_config(source)
        if DELTA not in config:
            raise InputError(f"--method delta takes a base and deltas on it; {source} is a run of all its weights")
        about = config[DELTA].get(BASE) if isinstance(config[DELTA], dict) else None
        step = about.get("step") if isinstance(about, dict) else None  # the base may have gone on to a better one
        if step not in checkpoints.steps(Path(sources[0]) / "checkpoints"):
            step = "best"
        if step not in bases:
            bases[step] = jt.load_run(Path(sources[0]), checkpoint=step)
        deltas.append(jt.load_run(Path(source), base=bases[step]))
        if not isinstance(deltas[-1].model, jt.deltas.Delta):
            raise InputError(f"{source} has new layers inside of its base's network, which no weights of it stand for")
    names = _names(sources[1:])
    first = Member(names[0], folded(deltas[0]), _variables(folded(deltas[0])))
    members = [first, *(_alike(name, folded(run), first) for name, run in zip(names[1:], deltas[1:], strict=True))]
    if len(members) == 1:
        return members, None
    if len({run.config[DELTA][BASE]["digest"] for run in deltas}) > 1:
        raise InputError(
            "the deltas stand on different steps of the base, or some have a head of their own on it and others its "
            "head; merge them apart"
        )
    params = jax.device_get(jt.deltas.plain(jt.deltas.base_of(deltas[0].model)))
    return members, Member(f"the base {sources[0]}", first.run, {**first.variables, "params": params})


def _read(source: str, model: str | None) -> Run:
    weights = is_weights(source)
    network = network_of(source, model if weights else None)
    run = folded(jt.load_run(Path(source))) if network is None else read_source(source, network, needs_head=True)
    if run.model.frozen:
        raise InputError(
            f"{source} has a frozen part besides its weights, new layers in a network say; no mean has that"
        )
    return run


def _alike(name: str, run: Run, first: Member) -> Member:
    """Returns a run as a member, its classes in the order of the first one's."""
    for entry, what in _INPUTS.items():
        mine, theirs = run.config.get(entry), first.run.config.get(entry)
        if entry in (TABLE, TOKENIZER):
            mine, theirs = ((one or {}).get("digest") for one in (mine, theirs))
        if not _same(mine, theirs):
            raise InputError(
                f"{name} takes {what} than {first.name} ({_short(mine)} against {_short(theirs)}), so that no one "
                f"network stands for both; fine-tune them from one base, or distill them into one"
            )
    if run.knows != first.run.knows:
        raise InputError(
            f"{name} knows {' and '.join(run.knows)}, {first.name} {' and '.join(first.run.knows)}; runs are fused "
            f"that learned the same"
        )
    variables = _variables(run)
    if run.tasks != first.run.tasks:
        variables = _with_tasks_of(name, run, variables, first)
    elif run.class_names != first.run.class_names and run.model.head:
        variables = _with_classes_of(name, run, variables, first)
    try:
        jt.fusion.check_alike([first.variables, variables], names=(first.name, name))
    except InputError as error:
        mine, theirs = (one.config.get("model") or one.model.name for one in (run, first.run))
        kinds = f"{first.name} is a {theirs}, {name} a {mine}: " if mine != theirs else ""
        raise InputError(f"{kinds}{error}") from None
    return Member(name, run, variables)


def _with_classes_of(name: str, run: Run, variables: Any, first: Member) -> Any:
    """Returns variables with the head in the order of the first run's classes, told by their names."""
    if CLASSES not in run.knows and LABELS not in run.knows:
        return variables
    return _matched(name, run.class_names, variables, first, first.run.class_names, head=f"params/{run.model.head}")


def _with_tasks_of(name: str, run: Run, variables: Any, first: Member) -> Any:
    """Returns variables of several tasks with the head of each in the order of the first run's classes."""
    if run.tasks.keys() != first.run.tasks.keys():
        mine, theirs = (", ".join(one.tasks) or "none" for one in (run, first.run))
        raise InputError(f"{name} has the tasks {mine}, {first.name} {theirs}; runs of the same tasks can be fused")
    for task, known in first.run.tasks.items():
        if run.tasks[task] != known:
            variables = _matched(
                name,
                run.tasks[task],
                variables,
                first,
                known,
                head=f"params/{re.escape(task)}",
                of=f" in task {task!r}",
            )
    return variables


def _matched(
    name: str, names: Sequence[str], variables: Any, first: Member, known: Sequence[str], *, head: str, of: str = ""
) -> Any:
    """Returns variables with one head in the order of other classes, told by their names."""
    try:
        found = match_classes(names, known, of=name, whose=first.name)
    except InputError as error:
        raise InputError(f"runs of the same classes can be fused: {error}") from None
    if found.same:
        return variables
    if found.by_number:
        warnings.warn(f"class {names[0]!r} of {name} is {known[found.places[0]]!r} of {first.name}{of}", stacklevel=2)
    as_theirs = [known[int(place)] if place >= 0 else own for own, place in zip(names, found.places, strict=True)]
    try:
        return jt.fusion.match_heads(variables, as_theirs, known, head=head)
    except InputError as error:
        raise InputError(f"{name} and {first.name} have other classes{of}: {error}") from None


def _variables(run: Run) -> Any:
    return jax.device_get(run.variables)


def _names(sources: Sequence[str]) -> list[str]:
    """Returns short names: the last parts of the paths, as many as tell them apart."""
    places = [str(Path(source).expanduser().resolve()) for source in sources]
    if len(set(places)) < len(places):
        raise InputError(f"expected each run once; got {' '.join(sources)}")
    parts = [Path(source).parts or (source,) for source in sources]
    several = (["/".join(one[-depth:]) for one in parts] for depth in range(1, max(map(len, parts)) + 1))
    return next(names for names in several if len(set(names)) == len(names))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):  # a number for all channels, and one for each
            one, other = (value if len(value) > 1 else value * max(len(one), len(other)) for value in (one, other))
        return len(one) == len(other) and bool(np.allclose(one, other, rtol=1e-5, atol=1e-6))
    return one == other


def _short(value: Any) -> str:
    return "none" if value is None else str(value)
