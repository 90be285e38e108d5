"""What every objective is held to, and what it is tried on: a small model that counts its traces, learnable batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtransfer as jt

KEY = jax.random.key(3)


def normalised(traces):
    """A perceptron with batch norm, which compiles fast; notes each trace in `traces`."""

    def init(key, inputs):
        keys = jax.random.split(key)
        body = 0.3 * jax.random.normal(keys[0], (inputs[0].size, 8))
        head = {"kernel": 0.3 * jax.random.normal(keys[1], (8, 4)), "bias": jnp.zeros(4)}
        stats = {"mean": jnp.zeros(8), "square": jnp.ones(8)}
        return {"params": {"body": {"kernel": body, "scale": jnp.ones(8)}, "head": head}, "batch_stats": stats}

    def apply(variables, inputs, *, train, key, axis=None):
        traces.append(1)
        params, stats = variables["params"], variables["batch_stats"]
        x = inputs.reshape(inputs.shape[0], -1) @ params["body"]["kernel"]
        mean, square = stats["mean"], stats["square"]
        if train:
            mean, square = x.mean(0), (x**2).mean(0)
            if axis is not None:
                mean, square = jax.lax.pmean((mean, square), axis)
            stats = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "square": 0.9 * stats["square"] + 0.1 * square}
        x = (x - mean[None]) * jax.lax.rsqrt(square - mean**2 + 1e-5)[None] * params["body"]["scale"][None]
        features = jnp.tanh(x)
        logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
        return {"features": features, "logits": logits}, {"batch_stats": stats}

    return jt.Model(init, apply, stages=("body", "head"))


def batches(rng, count, rows=16):
    """Learnable batches: the class is the brightest quarter of the image."""
    out = []
    for _ in range(count):
        label = rng.integers(0, 4, rows)
        image = 0.3 * rng.normal(size=(rows, 4, 4, 1))
        for row, y in enumerate(label):
            image[row, 2 * (y // 2) : 2 * (y // 2) + 2, 2 * (y % 2) : 2 * (y % 2) + 2] += 1
        index = rng.permutation(rows).astype(np.int32)
        image2 = image + 0.3 * rng.normal(size=image.shape)
        images = {"image": image.astype(np.float32), "image2": image2.astype(np.float32)}
        several = (label[:, None] <= np.arange(4)).astype(np.float32)  # any number of labels hold at once
        out.append({**images, "label": label.astype(np.int32), "labels": several, "index": index})
    return out


def assert_same_on_any_devices(
    make, mesh_of, *, rows=(16, 8), domains=("source", "target"), optimizer=None, steps=3, atol=1e-5
):
    """Domains of unequal size: one device, a mesh of 4 and pmap of 4 end alike, and no batch is traced again.

    Args:
      make: from the model to its objective, or to (objective, optimizer) where updates alternate.
      mesh_of: the fixture.
      rows: the size of a batch of each domain.
      domains: their names.
      optimizer: where `make` gives none.
      steps: how many.
      atol: for parameters, state and metrics, relative to the largest entry.
    """
    rng, traces = np.random.default_rng(2), []
    parts = zip(*(batches(rng, steps, count) for count in rows), strict=True)
    data, model = [dict(zip(domains, part, strict=True)) for part in parts], normalised(traces)
    made = make(model)
    objective, optimizer = made if isinstance(made, tuple) else (made, optimizer or optax.sgd(0.05, momentum=0.9))
    ended = []
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        state, step = jt.init(objective, optimizer, KEY, data[0]), jt.train_step(objective, optimizer, **place)
        for number, batch in enumerate(data):
            state, metrics = step(state, batch)
            if number == 0:
                traces.clear()
        assert not traces, f"it was traced again for a batch of the same shape, {place}"
        assert all(np.isfinite(float(value)) and np.shape(value) == () for value in metrics.values())
        ended.append(jt.tree.leaves_by_path(jax.tree.map(np.array, (state.params, state.state, dict(metrics)))))
    assert ended[0]
    for other in ended[1:]:
        assert other.keys() == ended[0].keys()
        for path, leaf in ended[0].items():
            within = atol * max(np.abs(leaf).max(initial=0), 0.1)
            np.testing.assert_allclose(other[path], leaf, rtol=1e-5, atol=within, err_msg=path)
    return ended[0]
