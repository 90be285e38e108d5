"""`jaxtransfer cache-teacher`: a run's outputs on a data set, to distil from without running it again."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer import tree
from jaxtransfer.cli.image_options import ImageOptions
from jaxtransfer.cli.options import DataDir, at_least, batch_for, check_folder
from jaxtransfer.cli.runs import Run, check_fits, check_knows_classes, load_run
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.runs.loggers import progress_bar


@dataclasses.dataclass(frozen=True)
class CacheTeacher:
    """Write what a run gives for each example of a split, to distil from.

    They are exact for images without augmentation, in inference mode.

    The cache knows its run and its data, and is refused with others.

    Example: jaxtransfer cache-teacher runs/a --out caches/a
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory of the teacher; its best checkpoint is used."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the cache. The same command again says that it is done."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the run's own)")] = None
    """Data set, as for `pretrain`."""
    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split that the student will learn from; slices such as train[:90%] work."""
    outputs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: logits)")] = (
        "logits",
    )
    """Outputs of the network to write: logits, features, or a map inside of it."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""
    batch_size: int = 256
    """Examples at a time."""
    resize: bool = False
    """Bring the images to the run's shape: size, and grey or colour."""
    half: bool = False
    """Write float16, which takes half of the space."""

    def run(self) -> None:
        """Computes and writes."""
        at_least(self, 1, "batch_size")
        check_folder(self.data_dir)
        run = load_run(self.directory)
        name, resize = self.data or run.config["data"], self.resize or bool(run.config.get("resize"))
        shape, resizing = ImageOptions().for_run(run, name, resize=resize)
        dataset = jt.data.load(name, self.split, data_dir=self.data_dir, image_shape=shape, resizing=resizing)
        check_fits(run, dataset, self.directory)
        if "logits" in self.outputs:
            check_knows_classes(run, self.directory, "--outputs logits (the default) are scores of classes")
        given = self._given(run)
        note = jt.data.outputs_note(dataset, given, teacher_identity(run))
        written = jt.data.write_outputs(self.out, note, self._batches(run, dataset, given))
        listed = ", ".join(f"{name} {list(output.shape)}" for name, output in given.items())
        kind = "float16" if self.half else "float32"
        print(f"{'wrote' if written else 'already done:'} {self.out}: {listed} {kind} of {len(dataset)} examples")

    def _given(self, run: Run) -> dict[str, jax.ShapeDtypeStruct]:
        """The outputs that are asked for, of one example."""
        image = jax.ShapeDtypeStruct((1, *run.config["image_shape"]), np.uint8)
        known = jax.eval_shape(lambda images: _apply(run, run.model.complete(run.variables), images), image)
        if not self.outputs:
            raise InputError(f"--outputs: expected names of outputs, got none; known: {', '.join(sorted(known))}")
        for name in self.outputs:
            if name not in known:
                raise unknown(f"output of {self.directory}", name, known)
        kind = np.float16 if self.half else np.float32
        return {name: jax.ShapeDtypeStruct(known[name].shape[1:], kind) for name in self.outputs}

    def _batches(self, run: Run, dataset: jt.data.Dataset, given) -> Iterator[dict[str, np.ndarray]]:
        """The outputs of batch after batch, without its padding."""

        @jax.jit
        def compute(variables, images):
            outputs = _apply(run, variables, images)
            return {name: outputs[name].astype(jnp.float32) for name in given}

        variables = jax.device_put(run.model.complete(run.variables))
        done = 0
        with progress_bar(len(dataset), 0, show=None) as update:
            for batch in jt.data.eval_batches(dataset, batch_for(dataset, self.batch_size), shard=(0, 1), cache=None):
                size = int(batch["mask"].sum())
                outputs = jax.device_get(compute(variables, batch["image"]))
                with np.errstate(over="ignore"):  # an infinite value is an error below
                    part = {name: outputs[name][:size].astype(given[name].dtype) for name in given}
                for name, values in part.items():
                    self._check_finite(name, values, outputs[name], done)
                yield part
                done += size
                update(done, "")

    def _check_finite(self, name, values, exact, first):
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            large = np.isfinite(exact[bad[0]]).all()
            remedy = "which float16 can't hold; leave out --half" if large else "train the teacher anew"
            raise InputError(
                f"{self.directory} gives {name} for example {first + bad[0]} that are "
                f"{'beyond 65504' if large else 'not finite'}, {remedy}"
            )


def teacher_identity(run: Run) -> dict[str, Any]:
    """Returns what tells a teacher from another: its data, model, step, and digests of configuration and weights."""
    weights = hashlib.sha256()
    for path, leaf in sorted(tree.leaves_by_path({"params": run.params, "state": run.state}).items()):
        leaf = np.ascontiguousarray(leaf)
        weights.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        weights.update(leaf.tobytes())
    return {
        "data": run.config["data"],
        "model": run.config["model"],
        "step": run.step,
        "config": hashlib.sha256(json.dumps(run.config, sort_keys=True).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def check_cache_is_of(cache: jt.data.TeacherCache, run: Run, directory: Path) -> None:
    """Raises where a cache holds the outputs of another teacher than the run in `directory`."""
    there, expected = cache.note["teacher"], teacher_identity(run)
    if there != expected:
        named = [key for key in ("data", "model", "step") if there.get(key) != expected[key]]
        changes = [f"{key} {there.get(key)} there, {expected[key]} now" for key in named]
        changes += [f"other {kind}" for kind in ("weights", "config") if there.get(kind) != expected[kind]]
        raise InputError(
            f"the teacher cache {cache.directory} holds the outputs of another teacher than {directory} "
            f"({'; '.join(changes)}); write one of it: jaxtransfer cache-teacher {directory} --out DIR"
        )


def attach_cache(
    dataset: jt.data.Dataset, directory: Path, run: Run, run_directory: Path, classes: Any = None
) -> jt.data.Dataset:
    """Returns the data set with the outputs of the teacher `run`, from the cache in `directory`, as columns.

    Args:
      dataset: what the cache was written for; `subset` comes after.
      directory: the folder of the cache.
      run: the teacher.
      run_directory: where the teacher lies.
      classes: integers [C], which of its logits belongs to class c; None where they are counted alike.

    Raises:
      InputError: where the folder is no whole cache, or one of another teacher or other data.
    """
    cache = jt.data.open_outputs(directory)
    check_cache_is_of(cache, run, run_directory)
    return jt.data.attach_outputs(dataset, cache, classes=classes)


def _apply(run: Run, variables, images):
    return run.model.apply(variables, images, train=False, key=None)[0]
