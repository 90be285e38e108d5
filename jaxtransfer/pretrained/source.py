"""Where weights come from, and what they are: tensors by name, with what is known of them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.formats.checkpoint import no_tensors, passed_over, tensors_in
from jaxtransfer.formats.read import read_file
from jaxtransfer.parts.learns import LABELS
from jaxtransfer.pretrained import hub
from jaxtransfer.pretrained.facts import Facts, beside
from jaxtransfer.pretrained.preprocessing import Preprocessing
from jaxtransfer.pretrained.text_facts import TextFacts, text_facts, weights_folder
from jaxtransfer.runs.deltas import folded
from jaxtransfer.runs.load import Run, load_run
from jaxtransfer.runs.no_run import runs_of_seeds


class Source(NamedTuple):
    """Weights as they were found.

    Attributes:
      name: for reports and errors.
      tensors: by name.
      facts: what is known of them.
      texts: reads what is known of them where they are a text encoder's.
      notes: what else is worth knowing.
      frozen: how many values beside them a network holds that nobody trained: the base of a delta.
    """

    name: str
    tensors: dict[str, np.ndarray]
    facts: Facts
    texts: Callable[[], TextFacts] = TextFacts
    notes: tuple[str, ...] = ()
    frozen: int = 0


def open_source(source: str | Path | Mapping[str, Any] | Run, part: str | None, *, apart: bool = False) -> Source:
    """Returns the weights behind a name, a path, a run, or those that are in memory.

    Args:
      source: see `load_pretrained`.
      part: the key of a checkpoint's state dict that is meant.
      apart: whether a run of a delta is read without its base; else the weights are the base's with the delta in them.

    Raises:
      InputError: where there is nothing to be read.
    """
    if isinstance(source, Run):
        return _of_run(source if apart else folded(source))
    if isinstance(source, Mapping):
        inner = {kind: source[kind] for kind in ("params", "batch_stats") if isinstance(source.get(kind), Mapping)}
        given = tree.leaves_by_path(inner) if "params" in inner else source
        return Source("a dict", tensors_in(given, part), Facts(), notes=_notes(given, part))
    if not isinstance(source, str | Path):
        hint = "pass its state_dict()" if hasattr(source, "state_dict") else "pass a path, a name, a run or a dict"
        raise InputError(f"expected weights, got {type(source).__name__}; {hint}")
    path = hub.fetch(source) if isinstance(source, str) and hub.is_name(source) else Path(source)
    if (path / "checkpoints").is_dir():
        return open_source(load_run(path), part, apart=apart)
    if several := runs_of_seeds(path):
        raise InputError(several)
    inner = weights_folder(path)
    found = read_file(inner)
    tensors, notes = tensors_in(found, part), _notes(found, part)
    facts = beside(inner)

    def texts() -> TextFacts:
        known = text_facts(path)
        return known if facts.network is None else known._replace(**_pooled(facts.network.get("model_options") or {}))

    return Source(str(source), tensors, facts, texts, notes)


def _pooled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a text encoder of ours pools, by the options that it was made with."""
    return {"pooling": options.get("pooling") or "class", "normalized": bool(options.get("normalized"))}


def _notes(found: Any, part: str | None) -> tuple[str, ...]:
    """Returns what there is besides the tensors that were taken, and besides their state dict if nobody said which."""
    loose = no_tensors(found, part)
    told = f"no tensors, and left out: {tree.listed(loose, limit=6)}" if loose else ""
    return tuple(filter(None, (passed_over(found) if part is None else "", told)))


def _of_run(run: Run) -> Source:
    shape, mean, std = run.preprocessing
    size, how = None if shape is None else (shape[0], shape[1]), run.resizing
    known = Preprocessing(size, how.crop, mean, std, how.interpolation)
    tensors = {path: np.asarray(leaf) for path, leaf in tree.leaves_by_path(run.variables).items()}
    options = run.config.get("model_options") or {}

    def texts() -> TextFacts:
        return TextFacts(**_pooled(options), tokenizer=run.tokenizer)

    network = {"model": run.config["model"], "model_options": options} if run.config.get("model") else None
    facts = Facts(known, run.class_names, None, "its configuration", network, LABELS in run.knows)
    frozen = sum(math.prod(np.shape(leaf)) for handle in run.model.handles for leaf in jax.tree.leaves(handle.tree))
    return Source(f"the run {run.directory}", tensors, facts, texts, frozen=frozen)
