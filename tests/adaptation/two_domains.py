"""A network without batch norm, features tanh(x W) and logits f V + b, and the same in NumPy, with its adversaries."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxtransfer as jt

B, M, D, F, C = 5, 4, 3, 4, 3
MASKS = {"source": np.float32([1, 1, 0, 1, 1]), "target": np.float32([1, 1, 1, 0])}


def net():
    def init(key, x):
        keys = jax.random.split(key)
        body, head = jax.random.normal(keys[0], (D, F)), jax.random.normal(keys[1], (F, C))
        return {"params": {"body": body, "head": {"kernel": head, "bias": jnp.zeros(C)}}}

    def apply(variables, x, *, train, key):
        params = variables["params"]
        features = jnp.tanh(x @ params["body"])
        return {"features": features, "logits": features @ params["head"]["kernel"] + params["head"]["bias"][None]}, {}

    return jt.Model(init, apply, "net", ("body", "head"))


def two_domains(rng, masked=False):
    def part(rows, name, shift):
        found = {"image": rng.normal(size=(rows, D)) + shift, "label": rng.integers(0, C, rows)}
        if masked:
            found["image"][MASKS[name] == 0] = 1e3
            found["mask"] = MASKS[name]
        return found

    return {"source": part(B, "source", 0.0), "target": part(M, "target", 0.5)}


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def seen(params, batch, name):
    """Features, logits and weights of a domain's rows."""
    features = np.tanh(batch[name]["image"] @ params["net"]["body"])
    weights = batch[name].get("mask", np.ones(len(features)))
    return features, features @ params["net"]["head"]["kernel"] + params["net"]["head"]["bias"], weights


def mean(values, weights):
    return np.sum(np.where(weights > 0, values, 0)) / np.sum(weights)


def perceptron(params, x):
    """Batch norm over the rows, as they are given."""
    for number in range(1, 10):
        if f"hidden{number}" not in params:
            break
        x = x @ params[f"hidden{number}"]["kernel"] + params[f"hidden{number}"]["bias"]
        if f"norm{number}" in params:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = x * params[f"norm{number}"]["scale"] + params[f"norm{number}"]["bias"]
        x = np.maximum(x, 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def on_both(params, pair, masks):
    """Rows that a mask leaves out are zeros for an adversary."""
    rows = np.concatenate([np.where(mask[:, None] > 0, x, 0) for x, mask in zip(pair, masks, strict=True)])
    scores = perceptron(params, rows)
    return scores[: len(pair[0])], scores[len(pair[0]) :]


def domain_loss(params, pair, masks, weights=(1.0, 1.0)):
    source, target = (scores[:, 0] for scores in on_both(params, pair, masks))
    near = mean(weights[0] * np.log1p(np.exp(-source)), masks[0])
    return 0.5 * near + 0.5 * mean(weights[1] * np.log1p(np.exp(target)), masks[1])


def slope(function, params, direction, h=1e-6):
    ahead, behind = (jax.tree.map(lambda p, d, step=step: p + step * d, params, direction) for step in (h, -h))
    return (function(ahead) - function(behind)) / (2 * h)


def within(tree, rng, *names):
    """A random direction in some of the parameters, by path."""
    flat = jt.tree.leaves_by_path(tree)
    drawn = [rng.normal(size=leaf.shape) * any(path.startswith(name) for name in names) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), drawn)
