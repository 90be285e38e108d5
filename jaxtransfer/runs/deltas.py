"""A run of a delta: what its configuration says of the difference and of its base, and the model made of both again."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import models, tree
from jaxtransfer.deltas import Delta, delta, described_part, digest, merged, rebuild
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.runs import checkpoints
from jaxtransfer.runs.directory import read_config
from jaxtransfer.runs.no_run import CONFIG

_R = TypeVar("_R")  # a `Run`, which stands above
DELTA, BASE = "delta", "base"
"""The entry of a configuration that says what trained on which base; and, within it, the base."""

INSIDE: dict[str, Callable[..., Model]] = {
    make.__name__: make
    for make in (
        *(models.houlsby, models.pfeiffer, models.parallel_adapter, models.adapt_former),
        *(models.visual_prompts, models.prefix_tuning),
    )
}
"""Differences of the function and not of the weights: new layers inside of the base's network, by name."""


def delta_note(model: Delta, run: Any = None) -> dict[str, Any]:
    """Returns what a configuration says of a delta: how its part was made, and its base by digest and by place.

    Args:
      model: as `jt.deltas.delta` made it.
      run: the directory of the base's run, where it is one.

    Returns:
      `kind` and `arguments` of the part, None for one that can't say how it was made; `base`.
    """
    part = described_part(model.part) or {"kind": None}
    where = {} if run is None else {"run": str(run)}
    return {**part, BASE: {"digest": digest_of(model), **where}}


def digest_of(model: Delta) -> str:
    """Returns the digest of what a delta stands on."""
    return digest({"params": model.frozen["base"].tree})


def made_of(note: Mapping[str, Any], model: Model, variables: Mapping[str, Any]) -> Model:
    """Returns the model of a base and the difference that a configuration tells of.

    Args:
      note: as `delta_note` wrote it; the base in it counts for nothing here.
      model: of the base.
      variables: of the base, which stay.

    Raises:
      InputError: for a kind that is not known, and as that kind does on this base.
    """
    if note["kind"] in INSIDE:
        arguments = {name: note[name] for name in ("only", "own") if note.get(name)}
        return INSIDE[note["kind"]](model, variables, **note.get("arguments", {}), **arguments)
    return delta(model, variables, rebuild({name: value for name, value in note.items() if name != BASE}))


def on_base(model: Model, note: Mapping[str, Any], directory: Path, base: Any, load: Callable[..., Any]) -> Model:
    """Returns the model of a run of a delta, its base beneath it: the one that is given, or found where it was noted.

    Args:
      model: of the base, as the configuration describes it.
      note: what the configuration says of the delta.
      directory: of the run.
      base: a run, its directory, or variables; None to look for it.
      load: `load_run`.

    Raises:
      InputError: for another base than that which it was trained on, and where none is found.
    """
    about, tried = note[BASE], []
    if note["kind"] is None:
        raise InputError(
            f"{directory} is a delta of your own making, which a run can't note; pass its model: "
            f"jt.load_run(directory, model=...)"
        )
    for name, one in _candidates(about, directory, base):
        read, found = _read(name, one, about, load), ""
        for variables in filter(None, (read, models.encoder_of(read))):  # one of several tasks gives its encoder
            fresh = with_fresh(variables["params"], about.get("fresh", {}))
            own = digest({"params": fresh})
            if own == about["digest"]:
                return made_of(note, model, {**variables, "params": fresh})
            found = found or own
        tried.append(f"{name} has {found[:8]}")
    if tried:
        raise InputError(
            f"{directory} is a delta on the base with the digest {about['digest'][:8]}, and {', '.join(tried)}: it is "
            f"another one, or has changed since; give the base that the delta was trained on"
        )
    told = about.get("run")
    raise InputError(
        f"{directory} is a delta, and its base is not {f'where it was, {told}' if told else 'noted'}; move it back, or "
        f"say where it is: jt.load_run(directory, base=...), evaluate or predict {directory} --base BASE, "
        f"`jaxtransfer merge BASE {directory} --method delta`"
    )


def check_base_of(model: Any, note: Mapping[str, Any], directory: Path) -> None:
    """Raises where a model that is given for a run of a delta stands on another base than the run's."""
    if isinstance(model, Delta) and (found := digest_of(model)) != note[BASE]["digest"]:
        raise InputError(
            f"{directory} is a delta on the base with the digest {note[BASE]['digest'][:8]}, and model= is one on "
            f"{found[:8]}; make it on the base that the run was trained on"
        )


def with_fresh(params: Any, fresh: Mapping[str, Any]) -> Any:
    """Returns parameters of a base with zeros in place of some of them: of a head for other classes.

    Args:
      params: of the base.
      fresh: shapes by path.
    """
    if not fresh:
        return params
    leaves = dict(tree.leaves_by_path(params))
    for path, shape in fresh.items():
        leaves[path] = np.zeros(tuple(shape), jnp.float32 if path not in leaves else leaves[path].dtype)
    return tree.nested(leaves)


def folded(run: _R) -> _R:
    """Returns a run of a delta as one of its base's network, the difference in the weights; another run as it is."""
    found: Any = run
    if not isinstance(found.model, Delta):
        return run
    whole = jax.device_get(merged(found.model, found.variables))
    params, name = whole.pop("params"), found.model.name
    return found._replace(
        config={entry: value for entry, value in found.config.items() if entry != DELTA},
        model=found.model.of,
        params={**found.params, name: params},
        state={**found.state, name: whole},
    )


def _candidates(about: Mapping[str, Any], directory: Path, base: Any) -> Iterator[tuple[str, Any]]:
    """Yields what may be the base: what is given alone, or the runs where it may lie, from where the note says on."""
    if base is not None:
        named = isinstance(base, str | Path)
        yield (str(base) if named else "the base that is given"), (Path(base) if named else base)
        return
    told = about.get("run")
    if told is None:
        return
    # Of a relative path the folders above the delta's are tried, too: both may have moved together.
    above = () if Path(told).is_absolute() else directory.resolve().parents
    for place in dict.fromkeys((Path(told), *(folder / told for folder in above))):
        if (place / CONFIG).is_file():
            yield str(place), place


def _read(name: str, base: Any, about: Mapping[str, Any], load: Callable[..., Any]) -> Mapping[str, Any]:
    itself = InputError(f"{name} is a delta itself; merge it into its base first, `jaxtransfer merge`")
    if isinstance(base, Path):
        if DELTA in read_config(base):
            raise itself
        step, kept = about.get("step"), checkpoints.steps(base / "checkpoints")
        if step is not None and step not in kept:
            raise InputError(
                f"the delta stands on step {step} of a run, and {name} keeps {', '.join(map(str, kept)) or 'none'}: it "
                f"is another one, or has gone on since; give the base that the delta was trained on"
            )
        base = load(base, checkpoint="best" if step is None else step)
    variables = getattr(base, "variables", base)
    if isinstance(getattr(base, "model", None), Delta):
        raise itself
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise InputError(f"base= is a run, its directory, or variables {{'params': ...}}; got a {type(base).__name__}")
    return variables
