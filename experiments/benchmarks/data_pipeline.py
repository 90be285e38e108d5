"""How many CIFAR images per second the input pipeline makes on this machine's processors.

Random crop, flip and host normalisation from decoded images in memory; batches of 128, two threads. The figure is
the median of several windows. Reads `cifar10` from `$TFDS_DATA_DIR`, else images of the same size made of noise.

    JAX_PLATFORMS=cpu python experiments/benchmarks/data_pipeline.py

Two cores, CIFAR-10, 15 s: 254,000 images/s normalised and 345,000 left as uint8 on an idle machine; 98,000 and
180,000 beside another job on the same cores. Decoding the files each time (`cache=None`): 10,000.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np

from jaxtransfer.data import Dataset, augment, load, pipeline

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cifar() -> Dataset:
    """CIFAR-10's training images where they are, else noise of the same shape."""
    if os.environ.get("TFDS_DATA_DIR"):
        return load("cifar10", "train").decoded()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)
    return Dataset.from_arrays(images, rng.integers(0, 10, 20_000), name="noise")


def images_per_second(dataset, transform, *, batch_size, threads, windows, seconds) -> float:
    """The median rate over `windows` of about `seconds` each."""
    rates = []
    with pipeline(dataset, batch_size, augment=transform, threads=threads).iterate() as batches:
        for _ in range(20):  # threads start, buffers fill
            next(batches)
        for _ in range(windows):
            start, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - start) < seconds:
                next(batches)
                count += batch_size
            rates.append(count / elapsed)
    return statistics.median(rates)


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a window")
    options = parser.parse_args()
    dataset = cifar()
    crop_flip = augment.compose(augment.random_crop(4), augment.random_flip())
    normalised = augment.compose(crop_flip, augment.normalize(MEAN, STD))
    settings = vars(options)
    result = {
        "data": dataset.name,
        "images_per_second": round(images_per_second(dataset, normalised, **settings)),
        "images_per_second_uint8": round(images_per_second(dataset, crop_flip, **settings)),
        "cores": os.cpu_count(),
        **settings,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
