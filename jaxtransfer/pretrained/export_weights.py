"""Weights out: a file of safetensors under our paths, or under the names of another library."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.formats import safetensors
from jaxtransfer.pretrained.described import Exportable, describe
from jaxtransfer.pretrained.facts import OUR_KEY
from jaxtransfer.pretrained.names_out import closest
from jaxtransfer.pretrained.scheme import Scheme
from jaxtransfer.pretrained.schemes import SCHEMES
from jaxtransfer.pretrained.schemes.own import OWN

LIBRARIES = tuple(sorted({library for scheme in SCHEMES for library in scheme.libraries}))
"""Whose names there are."""
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ExportedWeights:
    """What was written.

    Attributes:
      path: the file.
      scheme: whose names it has.
      tensors: how many.
      count: how many values they have.
      bytes: how large the file is.
    """

    path: Path
    scheme: str
    tensors: int
    count: int
    bytes: int

    def __str__(self):
        return f"{self.path}: {self.tensors} tensors, {self.count:,} values, {self.bytes:,} bytes, names: {self.scheme}"


def export_weights(
    source: Exportable,
    path: str | Path,
    *,
    scheme: str | Scheme = OWN,
    dtype: Any = None,
) -> ExportedWeights:
    """Writes a model's weights and batch statistics as a file of safetensors, which other libraries read.

    Names and layouts are those of the tables that `load_pretrained` reads by, turned around; each tensor is read back
    before it is taken, so that importing the file gives the same bits. What is known of the weights stands in the
    file's metadata: preprocessing, class names, the network. `load_pretrained` and `jaxtransfer convert` find it there.

        jt.export_weights("runs/a", "a.safetensors", scheme="torchvision")
        torchvision.models.resnet18(num_classes=5).load_state_dict(safetensors.torch.load_file("a.safetensors"))

    Args:
      source: a run directory, a `Run`, what `load_pretrained` gave, or a pair (model, variables).
      path: the file to write.
      scheme: whose names: "jaxtransfer" (our paths, by default), "torchvision", "timm", "huggingface" or another of
        `jaxtransfer.pretrained.LIBRARIES`; or a scheme.
      dtype: the type that floating values are written in, float32, float16 or bfloat16; None keeps each as it is.

    Returns:
      What was written.

    Raises:
      InputError: for an unknown scheme, or one that lacks names for some of the model's leaves; for values that the
        type can't hold; where the source can't be read or the file not be written.
    """
    schemes = _schemes(scheme)
    kind = _dtype(dtype)
    path = Path(path)
    if path.is_dir():
        raise InputError(f"expected a file to write, and {path} is a folder")
    found = describe(source)
    network = None if found.model.recipe is None else found.model.recipe.build
    fitting = [one for one in schemes if not one.networks or network in (None, *one.networks)]
    if not fitting:
        whose = scheme if isinstance(scheme, str) else scheme.name
        raise InputError(
            f"{found.name} is a {network}, and {whose} has no names for it; choose another scheme, or "
            f"'jaxtransfer', whose paths are every network's"
        )
    leaves = {name: _cast(name, leaf, kind) for name, leaf in found.leaves.items()}
    chosen, tensors, left, _ = closest(fitting, leaves)
    if left:
        raise InputError(
            f"{found.name} can't be written by the names of {scheme if isinstance(scheme, str) else chosen.name}: "
            f"{chosen.name} has none for {len(left)} of {len(leaves)} leaves, {tree.listed(left, limit=3)}; choose "
            f"another scheme, or 'jaxtransfer', whose paths are every network's"
        )
    heads = next((leaf.shape[0] for name, leaf in leaves.items() if name.endswith("attention/query/bias")), None)
    told = found.entries() | {"scheme": chosen.name, "heads": heads}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.write(path, tensors, {"format": "pt", OUR_KEY: json.dumps(told)})
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    count = sum(tensor.size for tensor in tensors.values())
    return ExportedWeights(path, chosen.name, len(tensors), count, path.stat().st_size)


def _schemes(scheme: str | Scheme) -> tuple[Scheme, ...]:
    if isinstance(scheme, Scheme):
        return (scheme,)
    if scheme not in LIBRARIES:
        raise unknown("scheme", str(scheme), LIBRARIES)
    return tuple(one for one in SCHEMES if scheme in one.libraries)


def _dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise unknown("type", str(dtype), DTYPES) from None
    if found.name not in DTYPES:
        raise unknown("type", found.name, DTYPES)
    return found


def _cast(name: str, leaf: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Returns a leaf in another type, floating ones alone."""
    if dtype is None or leaf.dtype == dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    with np.errstate(over="ignore"):
        cast = leaf.astype(dtype)
    if not np.array_equal(np.isfinite(leaf), np.isfinite(cast)):
        raise InputError(f"{name} has values up to {np.abs(leaf).max():.3g}, beyond {dtype.name}; choose a wider type")
    return cast
