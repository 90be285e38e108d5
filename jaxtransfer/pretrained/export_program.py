"""A network as a program: StableHLO for any batch size, its weights beside it, served without this library."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxtransfer import models, tree
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.pretrained.described import Described, Exportable, describe

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROBABILITIES = "probabilities"
PROGRAM, WEIGHTS, ABOUT = "program.jax", "weights.npz", "about.json"
FORMAT = 1


class ExportedProgram(NamedTuple):
    """What was written.

    Attributes:
      folder: with `program.jax`, `weights.npz` and `about.json`.
      inputs: type and shape of the images, `uint8[batch,32,32,3]`.
      outputs: the same of each output, by name.
      platforms: what the program runs on.
      bytes: how large the files are together.
    """

    folder: Path
    inputs: str
    outputs: dict[str, str]
    platforms: tuple[str, ...]
    bytes: int

    def __str__(self):
        given = ", ".join(f"{name} {value}" for name, value in self.outputs.items())
        return f"{self.folder}: {self.inputs} to {given} on {', '.join(self.platforms)}, {self.bytes:,} bytes"


def export_program(
    source: Exportable,
    folder: str | Path,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    normalize: bool = True,
    outputs: Sequence[str] = (),
    image_shape: tuple[int, int, int] | None = None,
    inputs: Any = None,
) -> ExportedProgram:
    """Writes a network as a program that runs in a process with JAX alone, for any batch size.

    The folder has three files. `program.jax` is what `jax.export` serialises: StableHLO, the number of images symbolic.
    `weights.npz` holds its weights under our paths; they are an argument of the program, not constants in it, so that
    they are on the device once whichever programs share them, can be replaced by others of the same network, and don't
    slow down compilation. `about.json` says what its images and outputs are: resizing, class names, types, versions.

        program = jax.export.deserialize(open("served/program.jax", "rb").read())
        weights = jax.device_put(dict(np.load("served/weights.npz")))
        probabilities = program.call(weights, images)["probabilities"]

    Types that NumPy lacks, bfloat16 say, are in `weights.npz` as their bits, uint16, which the program knows.

    Args:
      source: a run directory, a `Run`, what `load_pretrained` gave, or a pair (model, variables).
      folder: to write; one that holds such a program is replaced.
      platforms: what it is to run on, of cpu, cuda, rocm and tpu; needs none of them here.
      normalize: whether the program takes images as they are, uint8 of the network's size, and normalises them itself;
        otherwise it takes float32, normalised already.
      outputs: names of the network's outputs, `logits`, `features`, `stage4`, and `probabilities`, the softmax of the
        logits, or of a run that knows `labels` the sigmoid of each (`about.json` tells which under `probabilities`; of
        such weights that are no run take the logits); by default the probabilities, or the features of a network that
        has learned without classes.
      image_shape: (H, W, C) of the images, where the source doesn't say it.
      inputs: a batch of inputs, or its `jax.ShapeDtypeStruct`, for networks of something else than images: tokens
        int32 [B, L], say. The program takes any number of such.

    Returns:
      What was written.

    Raises:
      InputError: without `flatbuffers`; for platforms, outputs and shapes that there aren't; for a network that is made
        for one batch size; where the source can't be read or the folder not be written.
    """
    for platform in platforms:
        if platform not in PLATFORMS:
            raise unknown("platform", str(platform), PLATFORMS)
    if not platforms:
        raise InputError(f"expected one or more platforms of {', '.join(PLATFORMS)}; got none")
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError("writing a program needs flatbuffers: pip install 'jaxtransfer[export]'")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / ABOUT).exists() or not any(folder.iterdir()))):
        raise InputError(f"{folder} is there and no exported program; choose another folder")
    found = describe(source)
    shape = image_shape or found.image_shape
    if inputs is not None:
        if not normalize or image_shape or not getattr(inputs, "shape", ()) or not hasattr(inputs, "dtype"):
            raise InputError(
                "inputs= is a batch of arrays [B, ...] as the network takes them; pass no image_shape= then"
            )
        shape = None
    elif shape is None:
        raise InputError(f"{found.name} doesn't say which images it takes; pass image_shape=(height, width, channels)")
    model = found.model if normalize else _bare(found)
    wanted = tuple(outputs) or ((PROBABILITIES,) if found.classes or found.labels else ("features",))
    leaves = tree.leaves_by_path(dict(jax.device_get(found.variables)))
    types = {path: np.asarray(leaf).dtype for path, leaf in leaves.items()}
    bits = {path: _bits(np.asarray(leaf)) for path, leaf in leaves.items()}
    program = _program(model, types, wanted, jax.nn.sigmoid if found.labels else jax.nn.softmax)
    given = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in bits.items()}
    (batch,) = export.symbolic_shape("batch")
    kind = jnp.uint8 if normalize else jnp.float32
    like: Any = inputs
    sides = tuple(like.shape[1:]) if shape is None else shape
    images = jax.ShapeDtypeStruct((batch, *sides), like.dtype if shape is None else kind)
    try:
        exported = export.export(jax.jit(program), platforms=tuple(platforms))(given, images)
    except InputError:
        raise
    except (TypeError, ValueError, NotImplementedError) as error:  # of symbolic dimensions, of platforms
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{found.name} can't be written for any batch size: {reason}") from error
    given_back = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    if fixed := [name for name, value in given_back.items() if not value.shape or value.shape[0] != batch]:
        raise InputError(f"{found.name} can't be written for any batch size: {fixed[0]} is of one")
    told = {
        "format": FORMAT,
        "inputs": _written(images),
        "outputs": {name: _written(value) for name, value in given_back.items()},
        "normalizes": normalize,
        "platforms": list(platforms),
        **found.entries(),
        **({PROBABILITIES: "sigmoid" if found.labels else "softmax"} if PROBABILITIES in wanted else {}),
        "image_shape": None if shape is None else list(shape),
        "jax": jax.__version__,
    }
    return _write(folder, bytes(exported.serialize()), bits, told)


def _program(model: Model, types: dict[str, np.dtype], wanted: Sequence[str], activation: Any) -> Any:
    """Returns the function of (weights by path, images) that is exported; the activation makes probabilities."""

    def program(weights: dict[str, Any], images: Any) -> dict[str, Any]:
        values = {path: _typed(weights[path], dtype) for path, dtype in types.items()}
        found, _ = model.apply(tree.nested(values), images, train=False, key=None)
        if "logits" in found:
            found = {PROBABILITIES: activation(found["logits"]), **found}
        for name in wanted:
            if name not in found:
                raise unknown("output", name, found)
        return {name: found[name] for name in wanted}

    return program


def _bare(found: Described) -> Model:
    """Returns the model of images that are normalised already."""
    described = models.describe(found.model)
    if described is None:
        raise InputError(f"{found.name}: its model is not of the zoo, so that its normalisation can't be taken off")
    return models.rebuild({**described, "mean": None, "std": None})


def _bits(leaf: np.ndarray) -> np.ndarray:
    """Returns values of a type that NumPy lacks as their bits."""
    return leaf if leaf.dtype.kind in "fiub" else leaf.view(f"u{leaf.dtype.itemsize}")


def _typed(value: Any, dtype: np.dtype) -> Any:
    return value if value.dtype == dtype else jax.lax.bitcast_convert_type(value, dtype)


def _written(value: Any) -> dict[str, Any]:
    """Returns a shape and a type as plain data, the symbolic dimension by its name."""
    return {"shape": [side if isinstance(side, int) else str(side) for side in value.shape], "dtype": value.dtype.name}


def _write(folder: Path, program: bytes, weights: dict[str, np.ndarray], told: dict[str, Any]) -> ExportedProgram:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).unlink(missing_ok=True)  # it is written last: without it the folder is no whole program
        np.savez(folder / WEIGHTS, **weights)  # pyright: ignore[reportArgumentType]
        (folder / PROGRAM).write_bytes(program)
        (folder / ABOUT).write_text(json.dumps(told, indent=1) + "\n")
        size = sum((folder / name).stat().st_size for name in (PROGRAM, WEIGHTS, ABOUT))
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
    shown = {name: _short(value) for name, value in told["outputs"].items()}
    return ExportedProgram(folder, _short(told["inputs"]), shown, tuple(told["platforms"]), size)


def _short(written: dict[str, Any]) -> str:
    return f"{written['dtype']}[{','.join(map(str, written['shape']))}]"
