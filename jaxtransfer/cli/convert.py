"""`jaxtransfer convert`: somebody's weights as a run."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

import jaxtransfer as jt
from jaxtransfer import models
from jaxtransfer.cli.options import DataDir, check_folder
from jaxtransfer.errors import InputError, unknown


@dataclasses.dataclass(frozen=True)
class Convert:
    """Make a run of somebody's weights, which all other commands then take.

    Example: jaxtransfer convert a.th --model resnet20 --data cifar10 --out runs/a
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """File (PyTorch, safetensors, .npz, ONNX), folder, hf:owner/name or timm:name, with @revision to pin it."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Network that they are of; `jaxtransfer models` lists them."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Run directory to write."""
    data: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the weights say, or numbers)")
    ] = None
    """Data set whose classes the outputs are, in its order."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""
    part: Annotated[str | None, tyro.conf.arg(metavar="KEY", help_behavior_hint="(default: the only one)")] = None
    """Key of the state dict in a checkpoint that has several: teacher, model_ema."""
    ignore: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Names of tensors to leave behind."""
    mean: Annotated[
        tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...", help_behavior_hint="(default: the weights say)")
    ] = ()
    """Mean of images in [0, 1] that the weights expect."""
    std: Annotated[
        tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...", help_behavior_hint="(default: the weights say)")
    ] = ()
    """Their standard deviation."""

    def run(self) -> None:
        """Writes the run and prints what became of each tensor."""
        check_folder(self.data_dir)
        if self.model not in models.ZOO:
            raise unknown("model", self.model, models.ZOO)
        if bool(self.mean) != bool(self.std):
            raise InputError("--mean and --std go together; pass both, or neither")
        names: tuple[str, ...] = ()
        if self.data is not None:
            names = tuple(jt.data.load(self.data, "test", data_dir=self.data_dir).class_names)
        loaded = jt.pretrained.load_named(
            self.source, self.model, part=self.part, ignore=self.ignore, mean=self.mean, std=self.std
        )
        jt.pretrained.write_run(loaded, self.out, class_names=names, data=self.data or "")
        print(f"{loaded.report}\nwritten to {self.out}")
