"""Somebody's weights as a run: what evaluates, predicts, fine-tunes and teaches like a run of our own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import models, tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.pretrained import fitting
from jaxtransfer.pretrained.load import Pretrained
from jaxtransfer.pretrained.match import best_match
from jaxtransfer.pretrained.schemes import SCHEMES
from jaxtransfer.pretrained.source import open_source
from jaxtransfer.runs.checkpoints import Checkpoints
from jaxtransfer.runs.configuration import FORMAT, check_config, check_weights
from jaxtransfer.runs.directory import open_run
from jaxtransfer.runs.load import Run


def run_of(
    loaded: Pretrained,
    *,
    class_names: Sequence[str] = (),
    image_shape: tuple[int, int, int] | None = None,
    data: str = "",
    config: Mapping[str, Any] | None = None,
) -> Run:
    """Returns somebody's weights as a run in memory, at step 0: what `load_run` gives of one that `write_run` wrote.

    Args:
      loaded: what `load_pretrained` gave, for a model of the zoo.
      class_names: of the outputs, in order; by default those that the weights bring along, or else numbers.
      image_shape: (H, W, C) of the images; by default what the weights expect, or the zoo's for this model.
      data: name of the data set that the classes are of.
      config: further entries of its configuration.

    Raises:
      InputError: for a model that is not of the zoo; where nothing says how images are normalised; for another number
        of class names than of outputs; for images that the weights are not laid out for.
    """
    described = models.describe(loaded.model)
    if described is None:
        raise InputError(f"model {loaded.model.name!r} is not of the zoo: a run can't say how it is made")
    if models.ZOO[described["model"]].takes_text:
        raise InputError(
            f"{described['model']} is a text encoder, and commands are for images; in Python jt.fit(out=, model=, "
            f"dataset=) writes runs on texts"
        )
    if described["mean"] is None:
        raise InputError(
            f"nothing says how the images of {loaded.report.source} are normalised; say it: load_pretrained(source, "
            f"jt.models.normalize(model, mean, std)), or --mean and --std"
        )
    outputs = described.pop("outputs")
    names = list(class_names) or list(loaded.class_names) or [str(number) for number in range(outputs)]
    if len(names) != outputs:
        raise InputError(f"the weights have {outputs} outputs, and there are {len(names)} class names")
    height, width, channels = models.ZOO[described["model"]].image
    usual = height, width, channels
    shapes = [image_shape] if image_shape else _shapes(loaded, usual)
    shape = next((one for one in shapes if _fits(loaded, one)), None)
    if shape is None:
        raise InputError(
            f"the weights are not laid out for images of {list(shapes[0])}: pass the image_shape= of the inputs that "
            f"load_pretrained had"
        )
    known = loaded.preprocessing
    entries = {
        **{"format": FORMAT, **described, "knows": [LABELS if loaded.labels else CLASSES], "class_names": names},
        "image_shape": list(shape),
        **{"data": data or loaded.report.source, "split": "train", "shots": None, "seed": 0, "resize": True},
        **{"source": loaded.report.source, "scheme": loaded.report.scheme},
        "preprocessing": None if known is None else known.as_entries(),
        **(config or {}),
    }
    return Run(entries, loaded.model, loaded.params, loaded.state, 0, {}, Path(loaded.report.source))


def write_run(
    loaded: Pretrained,
    directory: str | Path,
    *,
    class_names: Sequence[str] = (),
    image_shape: tuple[int, int, int] | None = None,
    data: str = "",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes somebody's weights as a run, at step 0, which `load_run` and all commands read.

    Args:
      loaded: what `load_pretrained` gave, for a model of the zoo.
      directory: where the run will be.
      class_names: as for `run_of`.
      image_shape: likewise.
      data: likewise.
      config: likewise.

    Returns:
      The directory.

    Raises:
      InputError: as `run_of`, and where a run of another configuration is there.
    """
    run = run_of(loaded, class_names=class_names, image_shape=image_shape, data=data, config=config)
    check_config(run.config, directory)
    with open_run(directory, run.config) as folder:
        saved = Checkpoints(folder / "checkpoints")
        try:
            saved.save(0, {"params": loaded.params, "state": loaded.state}, {})
        finally:
            saved.close()
    return Path(directory)


def count_outputs(source: Any, model: Model, *, part: str | None = None, ignore: tree.Patterns = ()) -> int:
    """Returns how many outputs the head of some weights has, so that a model can be made for them.

    Args:
      source: as for `load_pretrained`.
      model: of the same architecture, with any number of outputs.
      part: as for `load_pretrained`.
      ignore: likewise.

    Raises:
      InputError: where no head is found among them.
    """
    found = open_source(source, part)
    inputs = fitting.shape_of(model, None)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), inputs)
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.leaves_by_path(dict(variables)).items()}
    matched = best_match(fitting.without(found.tensors, ignore)[0], shapes, SCHEMES)
    bias = matched.values.get("params/head/bias")
    if bias is None:
        raise InputError(
            f"{found.name} has no head that fits model {model.name!r} (the closest scheme is {matched.scheme.name}); "
            f"choose the network that the weights were trained in"
        )
    return bias.shape[0]


def _fits(loaded: Pretrained, shape: tuple[int, int, int]) -> bool:
    """Whether the weights are those of a model of such images: the positions of a transformer are of one size."""
    try:
        check_weights(loaded.model, loaded.params, {"image_shape": list(shape)}, "")
    except InputError:
        return False
    return True


def _shapes(loaded: Pretrained, usual: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Returns what the images may be, the likeliest first: the weights show which of them they are laid out for."""
    size = None if loaded.preprocessing is None else loaded.preprocessing.size
    channels = dict.fromkeys((usual[2], 3, 1, 4))
    places = (size or (usual[0], usual[1]), (usual[0], usual[1]))
    return [(height, width, count) for height, width in places for count in channels]
