"""Options of the optimiser and of its rate over the steps, which all commands share that train."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import optax
import tyro

from jaxtransfer import schedules
from jaxtransfer.cli.values import at_least, positive
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.optim import kernels

OPTIMIZERS = {  # of a rate and a weight decay, which kernels alone feel
    "adam": lambda rate, decay: optax.adamw(rate, weight_decay=decay, mask=kernels) if decay else optax.adam(rate),
    "sgd": lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay, kernels) if decay else optax.identity(),
        optax.sgd(rate, momentum=0.9, nesterov=True),
    ),
    "lars": lambda rate, decay: optax.lars(rate, decay, weight_decay_mask=kernels, trust_ratio_mask=kernels),
}
COSINE, STEP = "cosine", "step"
SCHEDULES: dict[str, Callable[["RateOptions", int, int], optax.Schedule]] = {  # of the steps, those of the warm-up
    COSINE: lambda options, steps, warmup: schedules.cosine(options.lr, steps, warmup=warmup),
    "linear": lambda options, steps, warmup: schedules.linear(options.lr, steps, warmup=warmup),
    "constant": lambda options, steps, warmup: schedules.constant(options.lr, warmup=warmup),
    STEP: lambda options, steps, warmup: schedules.step_decay(
        options.lr, options.places_in(steps), factor=options.factor or _FACTOR, warmup=warmup
    ),
}
_MILESTONES, _FACTOR = (0.5, 0.75), 0.1


@dataclasses.dataclass(frozen=True)
class RateOptions:
    """By which steps to learn."""

    optimizer: Annotated[str, tyro.conf.arg(metavar="NAME")] = "adam"
    """adam; sgd with Nesterov momentum 0.9; or lars, for contrast with large batches (--lr 0.3 per 256 examples)."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=f"(default: {COSINE})")] = None
    """How the rate goes on from its peak: cosine or linear, down to zero; step, down at --milestones; or constant."""
    milestones: Annotated[
        tuple[float, ...], tyro.conf.arg(metavar="SHARE ...", help_behavior_hint="(step; default: 0.5 0.75)")
    ] = ()
    """Shares of the steps after which the rate is multiplied by --factor."""
    factor: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=f"(step; default: {_FACTOR})")
    ] = None
    """By which the rate is multiplied at each milestone."""
    warmup: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: none)")] = None
    """Steps in which the learning rate first rises to --lr, of --steps (of each stage's, where there are several)."""
    weight_decay: float = 0.0
    """Weight decay, of kernels alone: no biases, norms, tokens, positions, temperatures.
    Decoupled under adam, else added to the gradient."""
    clip: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: never)")] = None
    """Largest norm of the gradient, which is scaled down to it; of each layer's under gradual-unfreeze."""

    def check_rates(self) -> None:
        """Raises for values that no run can have."""
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name in ("milestones", "factor"):
            if getattr(self, name) not in (None, ()) and self.schedule != STEP:
                raise InputError(f"--{name} is of --schedule {STEP}; got --schedule {self.schedule or COSINE}")
        if list(self.milestones) != sorted(set(self.milestones)) or not all(0 < one < 1 for one in self.milestones):
            raise InputError(
                f"--milestones are shares of the steps that rise, above 0 and below 1; got "
                f"{' '.join(f'{one:g}' for one in self.milestones)}"
            )
        if self.factor is not None and not 0 < self.factor <= 1:
            raise InputError(f"--factor must be above 0 and at most 1; got {self.factor}")
        at_least(self, 0, "weight_decay", "warmup")
        positive(self, "lr", "clip")

    def check_warmup(self, steps: int) -> None:
        """Raises for a warm-up that is as long as the steps that it is a part of."""
        if self.warmup and self.warmup >= steps:
            raise InputError(f"--warmup must be shorter than the {steps} steps that it is a part of; got {self.warmup}")

    def places_in(self, steps: int) -> list[int]:
        """Returns the milestones as steps, each at least one after the one before and after the warm-up."""
        places, last = [], self.warmup or 0
        for share in self.milestones or _MILESTONES:
            last = max(last + 1, round(share * steps))
            places.append(last)
        return places

    def optimizer_for(self, steps: int) -> optax.GradientTransformation:
        """Returns the optimiser with its schedule over `steps`: a linear warm-up, then what --schedule says."""
        self.check_warmup(steps)
        rate = SCHEDULES[self.schedule or COSINE](self, steps, self.warmup or 0)
        optimizer = OPTIMIZERS[self.optimizer](rate, self.weight_decay)
        return optimizer if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), optimizer)
