"""`jaxtransfer evaluate`: how good a run is on a data set."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

import jaxtransfer as jt
from jaxtransfer.cli.options import DataDir, at_least, check_folder
from jaxtransfer.cli.runs import check_fits, load_run, warn_of_other_classes
from jaxtransfer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on every example of a split; prints one JSON line.

    Example: jaxtransfer evaluate runs/a --data digits/noisy
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory; its best checkpoint is used."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the run's own)")] = None
    """Data set, as for `pretrain`; its classes must be the run's."""
    split: Annotated[
        str | None, tyro.conf.arg(metavar="SPLIT", help_behavior_hint="(default: the run's --eval-split, else test)")
    ] = None
    """Split to evaluate on; slices such as test[:100] work."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""
    batch_size: int = 256
    """Examples at a time."""
    resize: bool = False
    """Bring the images to the run's shape: size, and grey or colour."""

    def run(self) -> None:
        """Evaluates and prints."""
        at_least(self, 1, "batch_size")
        check_folder(self.data_dir)
        run = load_run(self.directory)
        name = self.data or run.config["data"]
        split = self.split or (run.config.get("eval_split", "test") if self.data is None else "test")
        shape = tuple(run.config["image_shape"]) if self.resize or run.config.get("resize") else None
        dataset = jt.data.load(name, split, data_dir=self.data_dir, image_shape=shape)
        check_fits(run, dataset, self.directory)
        classes = len(run.config["class_names"])
        if dataset.classes != classes:
            raise InputError(
                f"{self.directory} knows {classes} classes, {name} has {dataset.classes}; finetune it on {name} first"
            )
        warn_of_other_classes(run, dataset, self.directory)
        state = jt.TrainState.of(run.params, run.state, step=run.step)
        metrics = jt.evaluate(jt.classification(run.model), state, jt.data.eval_batches(dataset, self.batch_size))
        facts = {"run": str(self.directory), "step": run.step, "data": name, "split": split}
        print(json.dumps({**facts, "examples": len(dataset), **metrics}))
