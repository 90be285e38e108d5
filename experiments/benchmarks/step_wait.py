"""How long training waits for its data: `jt.fit` with ResNet-20 on CIFAR-10, random crop and flip, batches of 128.

Reads `cifar10` from `$TFDS_DATA_DIR`, else images of the same size made of noise. `data_wait_fraction` is that of the
whole call; `running_wait_fraction` leaves out the time of compiling, and is the one that should be below 0.02.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.step_wait

Two cores, CIFAR-10, 31 s: 0.44 % of the whole call and 0.50 % without compiling (3.7 s), at 185 images/s.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import optax
import tyro

import jaxtransfer as jt
from experiments.benchmarks.data_pipeline import MEAN, STD, cifar
from jaxtransfer.data import augment


@dataclasses.dataclass(frozen=True)
class Wait:
    """Train for some steps and tell how long they waited for data; prints one JSON line."""

    steps: int = 40
    """Updates."""
    batch_size: int = 128
    """Images per update."""
    threads: int = 2
    """Threads that make batches."""
    model: str = "resnet20"
    """A model of the zoo, for images 32×32."""
    tiny: bool = False
    """Three steps of a small net: shows that it runs, not how long it waits."""


def main(wait: Wait) -> dict[str, Any]:
    """Trains, prints the figures and returns them."""
    if wait.tiny:
        wait = dataclasses.replace(wait, steps=3, batch_size=8, model="small-cnn")
    dataset = cifar()
    model = jt.models.normalize(jt.models.create(wait.model, dataset.classes), MEAN, STD)
    crop_flip = augment.compose(augment.random_crop(4), augment.random_flip())
    batches = jt.data.pipeline(dataset, wait.batch_size, augment=crop_flip, threads=wait.threads)
    fitted = jt.fit(
        jt.classification(model), optax.sgd(0.1, momentum=0.9), batches, steps=wait.steps, log_every=10, progress=False
    )
    timing = fitted.timing
    running = timing["seconds"] - timing["compile_seconds"]
    result = {
        "data_wait_fraction": round(timing["data_wait_fraction"], 5),
        "running_wait_fraction": round(timing["data_wait_fraction"] * timing["seconds"] / running, 5),
        "images_per_second": round(timing["examples_per_second"], 1),
        "seconds": round(timing["seconds"], 2),
        "compile_seconds": round(timing["compile_seconds"], 2),
        "data": dataset.name,
        "device": jax.devices()[0].device_kind,
        **dataclasses.asdict(wait),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Wait))
    except jt.InputError as error:
        print(f"step_wait: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
