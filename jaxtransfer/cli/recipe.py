"""Options of how a classifier is trained, besides its optimiser: by which examples, average, precision, weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.storage import StorageOptions
from jaxtransfer.cli.validation import share_of
from jaxtransfer.cli.values import positive
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.methods import Phase

DTYPES = ("float32", "bfloat16", "float16")
_TYPES = ("dtype", "param_dtype")
_BALANCED = "balanced"
_AVERAGE = "average"


@dataclasses.dataclass(frozen=True)
class RecipeOptions(StorageOptions):
    """How to train a classifier, besides the optimiser."""

    val_split: Annotated[str | None, tyro.conf.arg(metavar="SPLIT", help_behavior_hint="(default: --eval-split)")] = (
        None
    )
    """Examples by which the best step is chosen, so that --eval-split tests what was chosen once, at the end: a split,
    such as train[90%:] beside --split train[:90%], or a share of the training examples, 0.1."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="(default: --seed)")] = ()
    """Several runs, one for each seed, in OUT/seed-N; their mean and its interval go to OUT/report.md and
    OUT/summary.json."""
    ema: Annotated[float | None, tyro.conf.arg(metavar="DECAY", help_behavior_hint="(default: none)")] = None
    """Keep a moving average of the weights, by a decay such as 0.999, at first their plain mean. It is evaluated beside
    them, chooses the best step, and is what evaluate and predict use."""
    dtype: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: float32, or the source's)")
    ] = None
    """bfloat16 computes in half the memory; weights, statistics, losses and averages stay float32. float16 does
    so too, with a loss whose scale follows its overflows."""
    remat: bool = False
    """Compute each block of the network anew in the backward pass: less memory on accelerators, about a third more time
    (ViT, ResNets, text encoders)."""
    class_weights: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="CLASS=WEIGHT ...", help_behavior_hint="(default: all 1)")
    ] = ()
    """What classes weigh in the loss, 1 where nothing is said; or balanced, by how rare each is."""

    def check(self) -> None:
        """Raises for values that no run can have, before anything is loaded."""
        share_of(self.val_split)
        positive(self, "ema")
        if self.ema is not None and self.ema >= 1:
            raise InputError(f"--ema is the share of the average that a step keeps, below 1; got {self.ema:g}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        super().check()
        self._weights_said()

    def weights(self, train: jt.data.Dataset) -> np.ndarray | None:
        """Returns the weights of the classes [C], or None where all weigh the same.

        Raises:
          InputError: for a name that is no class.
        """
        if not self.class_weights:
            return None
        if self.class_weights == (_BALANCED,):
            return jt.data.balanced_weights(train)
        found = np.ones(train.classes)
        for name, weight in self._weights_said().items():
            if name not in train.class_names:
                raise unknown(f"class of {train.name}, in --class-weights,", name, train.class_names)
            found[train.class_names.index(name)] = weight
        if not found.any():
            raise InputError("--class-weights: all classes weigh 0, which leaves nothing to learn from")
        return found

    def entries(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries of a run's configuration that follow from the options, besides these.

        Args:
          config: that of the network.
        """
        found: dict[str, Any] = {}
        options = dict(config.get("model_options") or {})
        for name in _TYPES:
            if (kind := getattr(self, name)) is not None:
                options.pop(name, None)
                options |= {} if kind == DTYPES[0] else {name: kind}
        if self.remat:
            options["remat"] = True
        if self.remat or any(getattr(self, name) is not None for name in _TYPES):
            found["model_options"] = options
        self.check_rounding(options)
        if self.ema is not None:
            found |= {"average": f"{config.get('model_name') or 'model'}_ema", "monitor": self.monitor}
        return found

    @property
    def monitor(self) -> str | None:
        """The metric that chooses the best step; None for the usual one."""
        return None if self.ema is None else f"{_AVERAGE}/accuracy"

    def applied(
        self, phases: Sequence[Phase], model: jt.Model, config: Mapping[str, Any]
    ) -> tuple[tuple[Phase, ...], jt.Objective]:
        """Returns the phases of a method, which keep the average, and what is evaluated.

        Args:
          phases: of the method.
          model: that they train.
          config: that of the network and its seed: for weights in bfloat16 the optimisers move copies, or round at
            random, and with float16 they scale the loss.
        """
        evaluated = jt.classification(model)
        options = config.get("model_options") or {}
        phases = [phase._replace(optimizer=self.mover(phase.optimizer, config)) for phase in phases]
        if options.get("dtype") == "float16":
            phases = [phase._replace(optimizer=jt.optim.loss_scaled(phase.optimizer)) for phase in phases]
        if self.ema is None:
            return tuple(phases), evaluated
        average = jt.ema(model, self.ema, warm_up=True)
        kept = []
        for phase in phases:
            assert isinstance(phase.objective, jt.Objective)
            kept.append(phase._replace(objective=phase.objective + jt.averaged(average)))
        beside = 0.0 * jt.classification(average).named(_AVERAGE)  # so that the loss stays that of the weights
        return tuple(kept), evaluated + beside

    def _weights_said(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.class_weights == (_BALANCED,):
            return found
        for word in self.class_weights:
            name, equals, text = word.rpartition("=")
            try:
                weight = float(text)
            except ValueError:
                weight = float("nan")
            if not equals or not 0 <= weight < float("inf"):
                raise InputError(f"--class-weights takes balanced, or CLASS=WEIGHT, from 0 on; got {word!r}")
            if name in found:
                raise InputError(f"--class-weights: {name!r} is there twice")
            found[name] = weight
        return found
