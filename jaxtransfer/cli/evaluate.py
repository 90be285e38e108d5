"""`jaxtransfer evaluate`: how good a run is on a data set."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

import jaxtransfer as jt
from jaxtransfer.cli.runs import check_fits, load_run
from jaxtransfer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on every example of a split, exactly; prints one JSON line.

    Example: jaxtransfer evaluate runs/source --data digits/noisy
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory; its best checkpoint is used."""
    data: str | None = None
    """Data set; the run's own by default."""
    split: str = "test"
    """Split."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    batch_size: int = 256
    """Examples at a time."""
    resize: bool = False
    """Bring the images to the run's shape."""

    def run(self) -> None:
        """Evaluates and prints."""
        run = load_run(self.directory)
        name = self.data or run.config["data"]
        shape = tuple(run.config["image_shape"]) if self.resize or run.config.get("resize") else None
        dataset = jt.data.load(name, self.split, data_dir=self.data_dir, image_shape=shape)
        check_fits(run, dataset, self.directory)
        classes = len(run.config["class_names"])
        if dataset.classes != classes:
            raise InputError(
                f"{self.directory} knows {classes} classes, {name} has {dataset.classes}; finetune it on {name} first"
            )
        state = jt.TrainState.of(run.params, run.state, step=run.step)
        metrics = jt.evaluate(jt.classification(run.model), state, jt.data.eval_batches(dataset, self.batch_size))
        facts = {"run": str(self.directory), "step": run.step, "data": name, "split": self.split}
        print(json.dumps({**facts, "examples": len(dataset), **metrics}))
