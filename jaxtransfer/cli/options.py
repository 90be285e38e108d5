"""Options that several commands share, and how they become data, optimisers and augmentations."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import jax
import optax
import tyro

from jaxtransfer import data as data_room
from jaxtransfer.cli.rates import OPTIMIZERS as OPTIMIZERS
from jaxtransfer.cli.rates import RateOptions
from jaxtransfer.cli.registry.augmentations import augmentation, check_augmentations
from jaxtransfer.cli.shard_options import ShardOptions
from jaxtransfer.cli.values import MOST, at_least, divides_by_devices, positive
from jaxtransfer.cli.values import at_most as at_most
from jaxtransfer.data import statistics as statistics
from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import expanded
from jaxtransfer.runs.configuration import FORMAT

MODES = ("jit", "pmap")
STEPS = 1000


DataDir = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: $TFDS_DATA_DIR)")]

MatmulPrecision = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as JAX is set up)")]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to learn from."""

    data: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """digits/upright (offline), folder:PATH (class folders) or a name of tfds; `jaxtransfer datasets` lists some."""
    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "test"
    """Split to evaluate on."""
    shots: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """Examples per class to train on, chosen by --seed."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""


@dataclasses.dataclass(frozen=True)
class Length:
    """Where a run lies, and how long it is."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Run directory for checkpoints, metrics and a report. The same command again resumes, or says that it is done."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=f"(default: {STEPS})")] = None
    """Updates in all."""
    epochs: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: by --steps)")] = None
    """In place of --steps: how often the training examples are seen; how many steps that makes is said."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Options from a file, YAML or JSON, by their names: lr: 0.01. Those of the command line go before them. The
    config.json of a run repeats it."""


@dataclasses.dataclass(frozen=True)
class RunOptions(ShardOptions, RateOptions, Length):
    """How to learn, and where to keep what was learned."""

    seed: int = 0
    """Of weights, order, augmentation and choice of shots."""
    eval_every: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: a tenth of --steps)")
    ] = None
    """Steps between evaluations, each with a checkpoint."""
    keep: int = 2
    """Newest checkpoints to keep, besides the best."""
    patience: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: never)")] = None
    """Stop after this many evaluations without a better accuracy."""
    mode: Annotated[str, tyro.conf.arg(metavar="NAME")] = "jit"
    """jit or pmap, over all devices; the numbers are the same to rounding."""
    matmul_precision: MatmulPrecision = None
    """Bits of products of matrices and convolutions of float32 numbers where the device has a choice: default, the
    fastest (bfloat16 on a TPU, TF32 on a GPU), high or highest (float32)."""
    distributed: bool = False
    """This is one of several processes that train together, as a TPU pod, SLURM, Open MPI or Kubernetes start them;
    jaxtransfer launch does on this machine."""
    data_patience: float = 60.0
    """Seconds without a batch until a warning says what is waited for; after ten times as many the command ends with
    exit code 75, to be given again. inf waits for ever."""
    profile: bool = False
    """Write a trace of a few steps to profile/ in --out, for TensorBoard, XProf or Perfetto."""
    dry_run: bool = False
    """Compile the step, print the memory that it takes on each device, and end; nothing is trained or written."""

    @property
    def updates(self) -> int:
        """Updates in all, where no epochs are asked for."""
        return STEPS if self.steps is None else self.steps

    @property
    def where(self) -> dict[str, Any]:
        """Arguments of `jt.fit` that say on which devices."""
        return self.placed(self.mode)

    @property
    def looked_at(self) -> dict[str, Any]:
        """Arguments of `jt.fit` that change nothing of what comes out."""
        return {"data_patience": self.data_patience, "profile": self.profile, "dry_run": self.dry_run}

    def for_data(self, examples: int, rows: int) -> Self:
        """Returns the options with their steps, counted from the epochs where these are given.

        Args:
          examples: of the training data.
          rows: examples per update.
        """
        steps = self.updates
        if self.epochs is not None:
            steps = max(1, math.ceil(min(self.epochs * examples / rows, MOST + 1)))
            if steps > MOST:
                raise InputError(f"--epochs must make at most {MOST} steps; got {self.epochs:g} of {examples} examples")
        self.check_warmup(steps)
        return dataclasses.replace(self, steps=steps)

    def say_steps(self) -> None:
        """Prints how many steps the epochs make."""
        if self.epochs is not None:
            print(f"--epochs {self.epochs:g}: {self.steps} steps", file=sys.stderr)

    def check(self) -> None:
        """Raises for values that no run can have, before anything is loaded."""
        self.check_rates()
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        at_least(self, 1, "steps", "keep", "eval_every", "patience")
        at_least(self, 0, "seed")
        positive(self, "epochs")
        if not self.data_patience > 0:
            raise InputError(f"--data-patience must be positive seconds, or inf; got {self.data_patience}")
        self.check_shard(self.mode)
        if self.steps is not None and self.epochs is not None:
            raise InputError("--steps and --epochs both say how long to train; give one of them")
        if self.seed >= 2**32:
            raise InputError(f"--seed must be below 2**32; got {self.seed}")


@dataclasses.dataclass(frozen=True)
class TrainOptions(RunOptions):
    """How to learn, and where to keep what was learned."""

    batch_size: int = 128
    """Examples per update, over all devices; a multiple of their number."""
    accumulate: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 1)")] = None
    """Batches whose gradients make one update, by their mean: where a larger batch doesn't fit into memory. --steps,
    --warmup and --eval-every count batches."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes."""
    augment: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: none)")] = ()
    """Any of resized-crop, crop, flip, rand-augment, color, erase, cutout, mixup, cutmix, in the order of use; each
    batch gets one of the last two."""
    balance: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as they are)")] = None
    """classes: draw each class equally often."""

    def for_data(self, examples: int, rows: int) -> Self:
        """Returns the options with their steps; of epochs so many that the last update has all of its batches."""
        counted, together = super().for_data(examples, rows), self.accumulate or 1
        if self.epochs is None or counted.steps is None:
            return counted
        return dataclasses.replace(counted, steps=math.ceil(counted.steps / together) * together)

    def optimizer_for(
        self,
        steps: int,
        around: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] | None = None,
    ) -> optax.GradientTransformation:
        """Returns the optimiser with its schedule over `steps` batches, of which --accumulate make an update.

        Args:
          steps: batches.
          around: `around(optimizer, updates)`, what stands around that of an update.
        """
        if (together := self.accumulate or 1) == 1:
            optimizer = super().optimizer_for(steps)
            return optimizer if around is None else around(optimizer, steps)
        if steps % together:
            raise InputError(
                f"--accumulate {together}: {steps} steps (of a stage, where there are several) make no whole number of "
                f"updates; choose --steps so that they do" + (", or --epochs" if self.epochs is None else "")
            )
        self.check_warmup(steps)
        warmup = None if self.warmup is None else math.ceil(self.warmup / together)
        one = dataclasses.replace(self, accumulate=None, warmup=warmup).optimizer_for(steps // together, around)
        return optax.MultiSteps(one, together).gradient_transformation()

    def pipeline(self, dataset: data_room.Dataset) -> data_room.Pipeline:
        """Returns the training batches."""
        transform, by = augmentation(self.augment, dataset), "label" if self.balance else None
        return data_room.pipeline(dataset, self.batch_size, seed=self.seed, augment=transform, balance=by)

    def check(self) -> None:
        """Raises for values that no run can have, before anything is loaded."""
        super().check()
        check_augmentations(self.augment)
        if self.balance not in (None, "classes"):
            raise unknown("--balance", self.balance, ["classes"])
        at_least(self, 1, "batch_size", "accumulate")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"--label-smoothing must be at least 0 and below 1; got {self.label_smoothing}")
        divides_by_devices("batch_size", self.batch_size)


def check_memory(batch_size: int, image_shape: Sequence[int], option: str = "--batch-size") -> None:
    """Raises for a batch that this machine could not even hold as images, before anything tries to."""
    needed = batch_size * math.prod(image_shape) * 5  # uint8, and float32 in the network
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        shape = "×".join(map(str, image_shape))
        raise InputError(
            f"{option} {batch_size}: so many images {shape} take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{there / 2**30:,.0f}; choose fewer at a time, or smaller images"
        )


def batch_for(dataset: data_room.Dataset, batch_size: int) -> int:
    """Returns how many examples of a data set to run at a time: what is asked for, or all where there are fewer.

    In several processes it is rounded up to a multiple of their devices, of which some may get padding alone.

    Raises:
      InputError: where this machine can't hold so many.
    """
    size = min(batch_size, max(1, len(dataset)))
    if processes.count() > 1:
        devices = jax.device_count()
        size = -(-size // devices) * devices
    check_memory(size, dataset.image_shape)
    return size


_ELSEWHERE = (
    "out",
    "data_dir",
    "epochs",
    "config",
    "shard",
    "mesh",
    "distributed",
    "data_patience",
    "profile",
    "dry_run",
)


def config_of(command: str, *options: Any, **more: Any) -> dict[str, Any]:
    """Returns what determines a run as JSON types: the options, but for where things lie; epochs count as steps."""
    config: dict[str, Any] = {"command": command, "format": FORMAT}
    for option in options:
        config |= {k: v for k, v in dataclasses.asdict(option).items() if k not in _ELSEWHERE}
    if config.get("weight_decay"):
        config["weight_decay_of"] = "kernels"  # of all parameters, in runs of old
    return {k: str(v) if isinstance(v, Path) else v for k, v in {**config, **more}.items()}


def load_pair(
    data: DataOptions,
    image_shape: tuple | None = None,
    *,
    resizing: data_room.Resizing | None = None,
    seed: int = 0,
    batch_size: int = 1,
    prepare: Callable[[data_room.Dataset], data_room.Dataset] = lambda train: train,
):
    """Returns the training and the evaluation data set, which must have the same classes.

    What `prepare` does to the whole training split is done before --shots chooses from it. Batches of `batch_size` of
    its images must fit into this machine.
    """
    at_least(data, 1, "shots")
    check_folder(data.data_dir)
    sets = [
        data_room.load(data.data, split, data_dir=data.data_dir, image_shape=image_shape, resizing=resizing)
        for split in (data.split, data.eval_split)
    ]
    check_memory(batch_size, sets[0].image_shape)
    if sets[0].class_names != sets[1].class_names:
        raise InputError(
            f"{data.data}: splits {data.split!r} and {data.eval_split!r} have different classes "
            f"({sets[0].classes} and {sets[1].classes})"
        )
    sets[0] = prepare(sets[0])
    if data.shots is not None:
        sets[0] = sets[0].subset(per_class=data.shots, seed=seed)
    return sets


def check_folder(data_dir: Path | None) -> None:
    """Raises where --data-dir names no folder."""
    if data_dir is not None and not expanded(data_dir).is_dir():
        raise InputError(f"--data-dir: expected the folder of prepared tfds data sets; there is no folder {data_dir}")
