"""How many images per second the augmentations make on this machine's processors, and what one costs.

CIFAR images from memory with crop, flip and RandAugment (2, 9); photos from JPEG files whose shorter side is 256, of
the aspect ratios 4:3 and 3:4 and quality 90, to 224 x 224 by a random resized crop, decoding included, with flip, and
with RandAugment too. The threads are the pipeline's own. The photos are noise smoothed like pictures (57 kB each), or
those of `--photos FOLDER`. Prints a JSON line for each: the median rate of several windows, and the processor's
seconds per image, which other jobs on the machine change little.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.augmentations

Two cores that did nothing else: CIFAR 21,100 images/s (58 µs of the processor each), photos 1,430 images/s (1.3 ms),
with RandAugment 990 images/s (1.8 ms). Cores that others share make less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from experiments.benchmarks.data_pipeline import cifar
from jaxtransfer.data import Dataset, Pipeline, Resizing, augment, load, pipeline


def photos(folder: Path, count: int) -> Path:
    """Writes JPEG files of smoothed noise in two class folders."""
    rng = np.random.default_rng(0)
    for number in range(count):
        size = (341, 256) if number % 2 else (256, 341)
        picture = sum(
            cv2.resize(rng.normal(0, 60 / scale, (size[1] // scale + 1, size[0] // scale + 1, 3)), size)
            for scale in (2, 8, 32)
        )
        path = folder / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.clip(128 + picture, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return folder


def measured(batches: Pipeline, *, windows: int, seconds: float) -> dict[str, float]:
    """The median rate over `windows` of about `seconds` each, and the processor's time per image."""
    rates, images, busy = [], 0, 0.0
    with batches.iterate() as stream:
        for _ in range(4):  # threads start, buffers fill
            next(stream)
        for _ in range(windows):
            start, spent, count = time.perf_counter(), time.process_time(), 0
            while (elapsed := time.perf_counter() - start) < seconds:
                next(stream)
                count += batches.batch_size
            rates.append(count / elapsed)
            images += count
            busy += time.process_time() - spent
    return {
        "images_per_second": round(statistics.median(rates), 1),
        "cpu_microseconds_per_image": round(1e6 * busy / images, 1),
        "images_per_cpu_second_of_two": round(2 * images / busy, 1),
    }


def main():
    """Prints a JSON line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photos in class folders (default: noise)")
    parser.add_argument("--count", type=int, default=128, help="photos that are written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    options = parser.parse_args()
    windows = {"windows": options.windows, "seconds": options.seconds}
    cv2.setNumThreads(1)  # the pipeline's threads are the ones that count

    def line(name: str, dataset: Dataset, rows: int, *transforms) -> None:
        batches = pipeline(dataset, rows, augment=augment.compose(*transforms), threads=options.threads)
        facts = {"data": dataset.name.partition(":")[0], "batch_size": rows, "threads": options.threads}
        print(json.dumps({"what": name, **facts, **measured(batches, **windows), "cores": os.cpu_count()}), flush=True)

    small = augment.random_crop(4), augment.random_flip()
    line("cifar: crop, flip, RandAugment", cifar(), 128, *small, augment.rand_augment(2, 9))
    with tempfile.TemporaryDirectory() as made:
        folder = options.photos or photos(Path(made), options.count)
        data = load(f"folder:{folder}", "all", image_shape=(224, 224, 3), resizing=Resizing())
        cut = augment.random_resized_crop(224), augment.random_flip()
        line("photos: resized crop, flip", data, 64, *cut)
        line("photos: resized crop, flip, RandAugment", data, 64, *cut, augment.rand_augment(2, 9))


if __name__ == "__main__":
    main()
