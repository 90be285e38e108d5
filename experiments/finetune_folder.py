"""ResNet-18 on a folder of images, from scratch or from a trained run.

    python -m experiments.finetune_folder --folder photos --out runs/photos             # PATH/<class>/*.png
    python -m experiments.finetune_folder --folder photos --from runs/source --out runs/moved

Images up to 64×64 get the stem for 32×32 images, larger ones ImageNet's; `--from` takes a run of this experiment, of
`jaxtransfer pretrain` or of `finetune_cifar`, with its model, its normalisation and a fresh head. The run directory is
one that `jaxtransfer predict` reads; the same command resumes it.

Without `--folder` it writes the embedded digits as enlarged RGB images into a temporary folder and trains on that:

    python -m experiments.finetune_folder --out runs/folder/upright
    python -m experiments.finetune_folder --domain noisy --from runs/folder/upright --out runs/folder/moved
    python -m experiments.finetune_folder --domain noisy --out runs/folder/scratch

On two cores that other jobs used too: 3, 5 and 6 minutes (3.4 minutes of processor time each), for 60 steps on 20
images per class, 16×16. Test accuracy on 200 images: upright 84.0 %; noisy 59.5 % from the run on upright digits and
56.5 % from scratch, one seed each, a difference within the noise of 200 images.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import cv2
import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from jaxtransfer.data import augment
from jaxtransfer.data.digits import CONFIGS
from jaxtransfer.devices import device_mesh
from jaxtransfer.errors import unknown
from jaxtransfer.runs import console
from jaxtransfer.runs.loggers import read_jsonl
from jaxtransfer.runs.report import write_report

AUGMENTATIONS = {
    "crop": lambda classes: augment.random_crop(4),
    "flip": lambda classes: augment.random_flip(),
    "cutout": lambda classes: augment.cutout(8),
    "mixup": lambda classes: augment.mixup(0.2, classes),
}
SMALL = 64  # the largest side for the stem of small images


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train ResNet-18 on a folder of images, from scratch or from a trained run."""

    out: Path = Path("runs/finetune_folder")
    """Run directory. The same command again resumes there, or says that it is done."""
    folder: Path | None = None
    """PATH/<split>/<class>/* or PATH/<class>/*; the embedded digits, written as images, when left out."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Run directory to start from: its best checkpoint; from scratch when left out."""
    image_size: int | None = None
    """Side to which images are brought; by default that of --from, else the first image's, 16 for the digits."""
    split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to evaluate on."""
    domain: str = "upright"
    """Of the digits: upright, rotated, inverted or noisy."""
    shots: int | None = None
    """Labels per class to train on; all when left out (20 of the digits that are written)."""
    steps: int = 60
    """Updates."""
    batch_size: int = 32
    """Examples per update."""
    lr: float = 1e-3
    """Peak learning rate of Adam; it falls to zero along a cosine."""
    augment: tuple[str, ...] = ("crop",)
    """Any of crop, flip, cutout, mixup."""
    seed: int = 0
    """Of weights, order, augmentation and choice of shots."""
    tiny: bool = False
    """Two steps on small digits: shows that everything runs, not what comes out."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains, or resumes, or says that it is done; returns the last evaluation."""
    if experiment.tiny:
        experiment = dataclasses.replace(experiment, folder=None, image_size=8, steps=2, batch_size=8, shots=2)
    if experiment.image_size is not None and experiment.image_size < 1:
        raise jt.InputError(f"--image-size must be at least 1; got {experiment.image_size}")
    for name in experiment.augment:
        if name not in AUGMENTATIONS:
            raise unknown("augmentation", name, AUGMENTATIONS)
    for name in ("steps", "batch_size", "lr"):
        if not getattr(experiment, name) > 0:
            raise jt.InputError(f"--{name.replace('_', '-')} must be positive; got {getattr(experiment, name)}")
    source = None if experiment.source is None else jt.load_run(experiment.source)
    with contextlib.ExitStack() as stack:
        folder, name = experiment.folder, f"folder:{experiment.folder}"
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            name = f"digits/{experiment.domain} as images"
            write_digits(folder, experiment.domain, side=32, per_class=4 if experiment.tiny else 20)
        return _trained(experiment, source, folder, name)


def _trained(experiment: Experiment, source: jt.Run | None, folder: Path, name: str) -> dict[str, Any]:
    """Trains on the images of a folder, which is called `name`; returns the last evaluation."""
    train, test = (
        jt.data.load(f"folder:{folder}", split, image_shape=_shape(experiment, source)).decoded()
        for split in (experiment.split, experiment.eval_split)
    )
    if experiment.shots is not None:
        train = train.subset(per_class=experiment.shots, seed=experiment.seed)
    config = {
        "experiment": "finetune_folder",
        "tiny": experiment.tiny,
        "data": name,
        "resize": True,
        "source": None if source is None else f"{experiment.source}, step {source.step}",
        **{key: getattr(experiment, key) for key in ("split", "eval_split", "shots", "steps", "batch_size", "lr")},
        **{key: getattr(experiment, key) for key in ("augment", "seed")},
        "class_names": list(train.class_names),
        "image_shape": list(train.image_shape),
        **_architecture(source, train),
    }
    model = jt.models.rebuild(config)
    params, state = (None, None) if source is None else _moved(source, model, train, experiment.seed)
    transform = augment.compose(*(AUGMENTATIONS[name](train.classes) for name in experiment.augment))
    fitted = jt.fit(
        jt.classification(model),
        optax.adam(optax.cosine_decay_schedule(experiment.lr, experiment.steps)),
        jt.data.pipeline(train, experiment.batch_size, seed=experiment.seed, augment=transform),
        steps=experiment.steps,
        key=experiment.seed,
        params=params,
        state=state,
        eval_data=jt.data.eval_batches(test, experiment.batch_size),
        eval_every=max(1, experiment.steps // 2),
        out=experiment.out,
        config=config,
        model=model,
        dataset=train,
        mesh=device_mesh(),
        log=console.announcer(),
    )
    title = f"{config['model']} on {name}"
    console.print_results(experiment.out, fitted, write_report(experiment.out, title, console.facts_of(config)))
    evaluations = [record for record in read_jsonl(experiment.out / "metrics.jsonl") if "eval/accuracy" in record]
    result = {
        "data": name,
        "from": None if source is None else str(experiment.source),
        "model": config["model"],
        "image_shape": config["image_shape"],
        "examples": [len(train), len(test)],
        **evaluations[-1],
    }
    print(json.dumps(result))
    return result


def write_digits(folder: Path, domain: str, *, side: int, per_class: int) -> None:
    """Writes embedded digits as RGB images, PATH/<split>/<class>/<number>.png.

    Args:
      folder: where to.
      domain: of the digits.
      side: of the images, in pixels.
      per_class: images of each class in the split `train`, and as many in `test`.
    """
    if domain not in CONFIGS:
        raise unknown("domain", domain, CONFIGS)
    for split in ("train", "test"):
        digits = jt.data.load(f"digits/{domain}", split).subset(per_class=per_class)
        for number, label in enumerate(digits.labels):
            small = np.repeat(digits[number]["image"], 3, axis=-1)
            path = folder / split / digits.class_names[label] / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC))


def _shape(experiment: Experiment, source: jt.Run | None) -> tuple[int, int, int] | None:
    """Returns the shape to which images are brought, or None for that of the first."""
    size, channels = experiment.image_size, 3
    if source is not None:
        height, width, channels = source.config["image_shape"]
        if size is None:
            return height, width, channels
    if size is None and experiment.folder is None:
        size = 16
    return None if size is None else (size, size, channels)


def _architecture(source: jt.Run | None, train: jt.data.Dataset) -> dict[str, Any]:
    if source is not None:
        return {key: source.config[key] for key in ("model", "mean", "std")}
    mean, std = jt.data.statistics(train)
    small = max(train.image_shape[:2]) <= SMALL
    return {"model": "resnet18" if small else "resnet18-imagenet", "mean": mean, "std": std}


def _moved(source: jt.Run, model: jt.Model, train: jt.data.Dataset, seed: int) -> tuple[Any, Any]:
    """Returns the weights and statistics to start from: the source's, with a fresh head."""
    fresh = model.init(jax.random.key(seed), train.read([0])["image"])
    params = jt.transfer(source.params[source.model.name], fresh["params"], reinit=model.head).params
    return {model.name: params}, {model.name: source.state[source.model.name]}


if __name__ == "__main__":
    try:
        main(tyro.cli(Experiment))
    except jt.InputError as error:
        print(f"finetune_folder: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
