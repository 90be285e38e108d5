"""Options that say how images become what a network takes, and how they follow from a run."""

import dataclasses
import sys
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.runs import Run, build_model
from jaxtransfer.data import Resizing
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.resizing import AREA, INTERPOLATIONS, STRETCH

_STRETCH = "stretch"
_BY_WEIGHTS = "(default: as the weights expect)"
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class CropOptions:
    """How images become what the network takes."""

    crop: Annotated[str | None, tyro.conf.arg(metavar="SHARE", help_behavior_hint=_BY_WEIGHTS)] = None
    """Resize images with their aspect ratio and keep this share in the middle, 0.875 say; or stretch."""
    interpolation: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_BY_WEIGHTS)] = None
    """bilinear or bicubic, as Pillow's; or area, the mean over what each pixel covers."""

    def check(self) -> None:
        """Raises for values that no image can be resized by, before anything is loaded."""
        self.resizing_over(STRETCH)

    @property
    def asked(self) -> bool:
        """Whether anything is said."""
        return self.crop is not None or self.interpolation is not None

    def resizing_over(self, usual: Resizing) -> Resizing:
        """Returns the resizing that is asked for; what isn't said is as `usual`."""
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)
        crop = usual.crop if self.crop is None else None if self.crop == _STRETCH else _share(self.crop)
        default = AREA if self.crop == _STRETCH else usual.interpolation
        if self.crop not in (None, _STRETCH) and usual == STRETCH:
            default = "bilinear"
        return Resizing(crop, self.interpolation or default)

    def for_new(
        self, data: str, split: str, data_dir: Any, shape: Shape | None, usual: tuple[int, ...]
    ) -> tuple[Any, Any]:
        """Returns the shape and the resizing of images for a network that is new; None, None leaves them as they are.

        Args:
          data: name of the data.
          split: the one to learn from.
          data_dir: folder of prepared data sets.
          shape: the shape that is asked for.
          usual: the one that the network was made for, which a folder of images of several sizes gets.
        """
        folder = data.startswith("folder:")
        if shape is None and folder and jt.data.several_sizes(jt.data.load(data, split, data_dir=data_dir)):
            shape = (usual[0], usual[1], 3)
            told = f"{shape[0]} x {shape[1]}, {self.resizing_over(Resizing())}"
            print(f"{data}: images of several sizes are brought to {told}", file=sys.stderr)
        if shape is None:
            if self.asked:
                raise InputError(
                    "--crop and --interpolation say how images are resized; add --image-shape to say to what"
                )
            return None, None
        return shape, self.resizing_over(Resizing() if folder else STRETCH)


@dataclasses.dataclass(frozen=True)
class ImageOptions(CropOptions):
    """How images become what the network takes."""

    image_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_BY_WEIGHTS)] = None
    """Height and width of images; positions of transformers are interpolated."""

    def check(self) -> None:
        """Raises for values that no image can be resized by, before anything is loaded."""
        super().check()
        if self.image_size is not None and not 1 <= self.image_size <= 2**13:
            raise InputError(f"--image-size must be at least 1 and at most {2**13}; got {self.image_size}")

    @property
    def asked(self) -> bool:
        """Whether anything is said."""
        return super().asked or self.image_size is not None

    def for_run(self, run: Run, data: str, *, resize: bool, usual: Resizing = STRETCH) -> tuple[Any, Any]:
        """Returns the shape and the resizing of images for a run; None, None where they must fit as they are.

        Args:
          run: at the size that is asked for, see `at_size`.
          data: name of the data.
          resize: whether they are to be resized in any case.
          usual: how, for a folder where the run doesn't say it; other data are stretched.
        """
        known = run.config.get("preprocessing") is not None
        if not (resize or known or self.asked):
            return None, None
        over = run.resizing if known else usual if data.startswith("folder:") else STRETCH
        return tuple(run.config["image_shape"]), self.resizing_over(over)

    def at_size(self, run: Run) -> Run:
        """Returns the run for images of the size that is asked for, the positions of a transformer interpolated."""
        shape = tuple(run.config["image_shape"])
        if self.image_size is None or shape[:2] == (self.image_size, self.image_size):
            return run
        shape = (self.image_size, self.image_size, shape[2])
        config, name = {**run.config, "image_shape": list(shape)}, run.model.name
        inputs = jax.ShapeDtypeStruct((1, *shape), np.uint8)
        try:
            loaded = jt.load_pretrained(run, build_model(run.config), inputs=inputs)
        except InputError as error:
            raise InputError(
                f"--image-size {self.image_size}: {run.directory} takes images {run.image_shape}: {error}"
            ) from None
        params, state = dict(loaded.variables), dict(run.state)
        return run._replace(
            config=config, params={**run.params, name: params.pop("params")}, state={**state, name: params}
        )


def noted(config: dict[str, Any], resizing: Resizing | None) -> dict[str, Any]:
    """Returns the entry of a configuration that says how images are resized; none for those that are stretched."""
    if resizing is None or resizing == STRETCH:
        return {}
    known = {name: config.get(name) for name in ("mean", "std")}
    return {"preprocessing": {"size": list(config["image_shape"][:2]), **resizing.as_entries(), **known}}


def _share(text: str) -> float:
    try:
        return Resizing(float(text)).crop or 0.0
    except (ValueError, InputError):
        raise InputError(f"--crop must be {_STRETCH}, or a share above 0 and at most 1; got {text}") from None
