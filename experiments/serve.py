"""Serves what `jaxtransfer export RUN --format jax --out FOLDER` wrote, without jaxtransfer: JAX and flatbuffers alone.

Command: python experiments/serve.py FOLDER IMAGES.npy, with images uint8 [B, H, W, C] of the size in `about.json`.
Time: the compilation of the network, once for each batch size. Result: a class and its probability for each image;
of labels that hold together the probability of each.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export

folder, images = Path(sys.argv[1]), np.load(sys.argv[2])
about = json.loads((folder / "about.json").read_text())
program = export.deserialize(bytearray((folder / "program.jax").read_bytes()))
weights = jax.device_put(dict(np.load(folder / "weights.npz")))
for row in np.asarray(jax.jit(program.call)(weights, images)["probabilities"]):
    if about["probabilities"] == "sigmoid":  # labels that hold together
        print(*(f"{name} {p:.6f}" for name, p in zip(about["class_names"], row, strict=True)))
    else:
        print(about["class_names"][row.argmax()], f"{row.max():.6f}")
