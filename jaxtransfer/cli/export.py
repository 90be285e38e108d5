"""`jaxtransfer export`: a run for other libraries, or as a program that needs none."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

import jaxtransfer as jt
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.pretrained import DTYPES, LIBRARIES, PLATFORMS

FORMATS = ("safetensors", "jax")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run's weights for another library, or its network as a program.

    Example: jaxtransfer export runs/a --scheme timm --out a.safetensors
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory; its best checkpoint is used."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """File to write; a folder for --format jax."""
    format: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as --out ends, else safetensors)")
    ] = None
    """safetensors, or jax: StableHLO for any batch size, served by JAX alone."""
    scheme: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: jaxtransfer)")] = None
    """Whose names (safetensors): jaxtransfer, torchvision, timm, huggingface, cifar, big_vision,
    efficientnet_lite_pytorch."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as they are)")] = None
    """Type of the weights (safetensors): float32, float16, bfloat16."""
    platforms: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: cpu cuda tpu)")
    ] = ()
    """What the program runs on (jax): cpu, cuda, rocm, tpu."""
    outputs: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: probabilities)")
    ] = ()
    """What the program gives (jax): probabilities, logits, features, stage1, ..."""
    normalized: bool = False
    """The program takes float32 images that are normalised already, not uint8 (jax)."""

    def run(self) -> None:
        """Writes, and prints what."""
        if self.format is not None and self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        ending = self.out.suffix[1:].lower()
        told = ending if ending in FORMATS else None
        if self.format is not None and told not in (None, self.format):
            raise InputError(f"--format {self.format}, and --out {self.out} ends as {told} does; change one of the two")
        chosen = self.format or told or FORMATS[0]
        if self.scheme is not None and self.scheme not in LIBRARIES:
            raise unknown("scheme", self.scheme, LIBRARIES)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("type", self.dtype, DTYPES)
        for platform in self.platforms:
            if platform not in PLATFORMS:
                raise unknown("platform", platform, PLATFORMS)
        tensors = {"scheme": self.scheme, "dtype": self.dtype}
        program = {"platforms": self.platforms, "outputs": self.outputs, "normalized": self.normalized}
        other, format = (program, "jax") if chosen == "safetensors" else (tensors, "safetensors")
        if given := [name for name, value in other.items() if value]:
            raise InputError(f"--{given[0]} goes with --format {format}; drop it, or choose that format")
        if chosen == "safetensors":
            print(jt.export_weights(self.directory, self.out, scheme=self.scheme or "jaxtransfer", dtype=self.dtype))
            return
        print(
            jt.export_program(
                *(self.directory, self.out),
                platforms=self.platforms or ("cpu", "cuda", "tpu"),
                outputs=self.outputs,
                normalize=not self.normalized,
            )
        )
