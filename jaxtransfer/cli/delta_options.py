"""Options of a delta: what trains beside frozen weights, checked before anything runs."""

import dataclasses
import math
import sys
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from jaxtransfer import tree
from jaxtransfer.cli.freezing import selects_nothing
from jaxtransfer.cli.registry.deltas import DELTAS, usual_of
from jaxtransfer.cli.registry.row import choices, row_of
from jaxtransfer.cli.runs import Run
from jaxtransfer.cli.values import at_least, positive
from jaxtransfer.deltas import digest
from jaxtransfer.errors import InputError
from jaxtransfer.methods import Phase
from jaxtransfer.runs.deltas import BASE, DELTA, made_of, with_fresh
from jaxtransfer.runs.directory import read_config

SIZES = ("rank", "alpha", "dropout", "block", "entries", "bottleneck", "prompts")
_FLOATS = ("alpha", "dropout")
_HEAD = "head"


def _size(option: str) -> Any:
    return tyro.conf.arg(metavar="FLOAT" if option in _FLOATS else "INT", help_behavior_hint=usual_of(option))


@dataclasses.dataclass(frozen=True)
class DeltaOptions:
    """What trains beside the source's weights, which stay."""

    delta: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help_behavior_hint=lambda _: choices(DELTAS)("none, all weights train")),
    ] = None
    """Train a small difference alone. The run holds it without the source, a run too, whose digest it notes; a new
    head trains whole. Kinds:"""
    only: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint="(default: query and value of attention, or all)"),
    ] = ()
    """Layers that a delta changes, by patterns over the keys of their paths: 'attention/.*/kernel' stage3."""
    rank: Annotated[int | None, _size("rank")] = None
    """Of the matrices that a delta adds."""
    alpha: Annotated[float | None, _size("alpha")] = None
    """They are multiplied by alpha / rank."""
    dropout: Annotated[float | None, _size("dropout")] = None
    """Probability with which an input is left out of the difference, in training, for a whole batch."""
    block: Annotated[int | None, _size("block")] = None
    """Inputs that are rotated together."""
    entries: Annotated[int | None, _size("entries")] = None
    """Of a spectrum."""
    bottleneck: Annotated[int | None, _size("bottleneck")] = None
    """Width of an adapter."""
    prompts: Annotated[int | None, _size("prompts")] = None
    """Tokens, or keys and values."""

    def check(self) -> None:
        """Raises for an unknown kind, and for options that mean nothing to it."""
        tree.matches("", self.only)  # raises
        at_least(self, 1, "rank", "entries", "bottleneck", "prompts")
        at_least(self, 2, "block")
        positive(self, "alpha")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"--dropout must be from 0 to below 1; got {self.dropout}")
        given = [name for name in (*SIZES, "only") if getattr(self, name) not in (None, ())]
        if self.delta is None:
            if given:
                raise InputError(f"--{given[0]} is of a delta; add --delta NAME, or leave it out")
            return
        usual = row_of("delta", self.delta, DELTAS).facts.usual
        for name in given:
            if name != "only" and name not in usual:
                raise InputError(f"--{name}: {self.delta} has none; leave it out")

    def around(self, optimizer: optax.GradientTransformation, updates: int) -> optax.GradientTransformation:
        """Returns the optimiser, which keeps the important directions alone where the kind has a budget of them.

        They fall from a tenth of the updates on to a half: about as for the paper's largest task.
        """
        if self._budget is None:
            return optimizer
        begin, settle = updates // 10, updates // 2
        return jt.deltas.within_budget(optimizer, rank=self._budget, steps=updates, begin=begin, settle=settle)

    def beside(self, phases: Sequence[Phase]) -> tuple[Phase, ...]:
        """Returns phases with what the kind minimises besides: AdaLoRA's directions are kept orthonormal."""
        if self._budget is None:
            return tuple(phases)
        apart = jt.deltas.orthogonality()
        return tuple(
            phase._replace(objective=phase.objective + apart)
            for phase in phases
            if isinstance(phase.objective, jt.Objective)
        )

    @property
    def _budget(self) -> int | None:
        """The rank that stays in the mean; None of a kind without a budget."""
        if self.delta is None or not DELTAS[self.delta].facts.budget:
            return None
        return DELTAS[self.delta].facts.usual["rank"] if self.rank is None else self.rank

    def made(
        self, source: Run, model: jt.Model, image_shape: Sequence[int], *, new_head: bool
    ) -> tuple[jt.Model, dict[str, Any]]:
        """Returns the model that trains on the frozen source, and what its run notes of it.

        Args:
          source: the run that it stands on.
          model: of the base, with the outputs that are wanted.
          image_shape: of its images.
          new_head: whether the head begins afresh: zeros in the base, and all of it trains.

        Raises:
          InputError: for a pattern that selects nothing, or a new head; for a rank that a kernel can't have, and
            whatever else the kind can't do on this network.
        """
        variables = source.variables
        shapes = _shapes(model, image_shape)
        head = [path for path in shapes if tree.matches(path, model.head)] if new_head else []
        self._check_only(shapes, head)
        fresh = {path: list(shapes[path]) for path in head}
        base = {**variables, "params": with_fresh(variables["params"], fresh)}
        about = {
            **{"run": str(source.directory), "step": source.step, "digest": digest(base)},
            **({"fresh": fresh} if fresh else {}),
        }
        budget = {} if self._budget is None else {"budget": {"rank": self._budget}}
        note = {**self._described(model, list(shapes), head), **budget, BASE: about}
        try:
            net = made_of(note, model, base)
            _shapes(net, image_shape)  # layers are looked for, ranks compared
        except InputError as error:
            raise InputError(f"--delta {self.delta}: {str(error).replace('only=', '--only ')}") from None
        return net, note

    def _check_only(self, paths: Collection[str], head: Collection[str]) -> None:
        for pattern in self.only:
            if not any(tree.matches(path, pattern) for path in paths):
                raise selects_nothing("only", pattern, list(paths))
        if self.only and any(tree.matches(path, self.only) for path in head):
            raise InputError("--only selects the head, which is new and trains whole anyway; choose other layers")

    def _described(self, model: jt.Model, paths: Collection[str], head: Collection[str]) -> dict[str, Any]:
        """Returns how the delta is made, as its run notes it."""
        row = DELTAS[str(self.delta)]
        given = {name: getattr(self, name) for name in SIZES}
        part = row.build(
            {name: value if given[name] is None else given[name] for name, value in row.facts.usual.items()}
        )
        if row.facts.inside:
            if self.only and part["kind"] == "visual_prompts":
                raise InputError(f"--only: {self.delta} has its tokens before all blocks; leave it out")
            return part | ({"only": list(self.only)} if self.only else {}) | ({"own": [model.head]} if head else {})
        usual = row.facts.only
        if self.only:
            part["only"] = list(self.only)
        elif usual is not None and any(tree.matches(path, usual) for path in paths):
            part["only"] = [usual]
        elif head:
            part["only"] = [rf"^(?!(?:{model.head})(?:/|$)).*(?:{row.facts.leaves})"]
        if not head:
            return part
        whole = {**(jt.deltas.described_part(jt.deltas.full()) or {}), "only": [model.head]}
        return {"kind": "chain", "parts": {"delta": part, _HEAD: whole}}


def _shapes(model: jt.Model, image_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by path, by tracing it."""
    image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
    found = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return {path: tuple(leaf.shape) for path, leaf in tree.leaves_by_path(found).items()}


def check_is_base(source: str, network: str | None) -> None:
    """Raises for a source that no delta can stand on: weights in a file, another delta.

    Args:
      source: what `--from` names.
      network: that weights in a file are of; None for a run.
    """
    if network is not None:
        raise InputError(
            f"--delta: a delta names its base by the digest of a run, and {source} are weights; make a run of them: "
            f"jaxtransfer convert {source} --out RUN"
        )
    if DELTA in read_config(source):
        raise InputError(
            f"--delta: {source} is a delta itself; merge it into its base, jaxtransfer merge BASE {source} --method "
            f"delta, and start from that"
        )


def say_counts(model: jt.Model, image_shape: Sequence[int]) -> None:
    """Prints how many parameters train, and how many stay."""
    trained = sum(map(math.prod, _shapes(model, image_shape).values()))
    frozen = sum(math.prod(np.shape(leaf)) for handle in model.handles for leaf in jax.tree.leaves(handle.tree))
    print(f"{trained:,} parameters train, {frozen:,} stay ({100 * trained / frozen:.2g} %)", file=sys.stderr)
