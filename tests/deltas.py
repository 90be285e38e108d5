"""A low-rank delta of a frozen base, as a user writes it: an ordinary file on `Model.frozen`."""

import dataclasses

import jax
import jax.numpy as jnp

import jaxtransfer as jt


def low_rank(model, variables, *, rank, only):
    """Returns the model of params + A·B, in which A and B train: B begins as zeros, so that the function is the base's.

    Args:
      model: the model of the base.
      variables: the base's parameters, which stay, and running state, which the delta starts from.
      rank: columns of A.
      only: patterns of the kernels, of which the first axis counts as inputs.
    """
    chosen = {path: w for path, w in jt.tree.leaves_by_path(variables["params"]).items() if jt.tree.matches(path, only)}

    def init(key, inputs):
        own = {}
        for number, (path, w) in enumerate(chosen.items()):
            rows = w.shape[0]
            a = jax.random.normal(jax.random.fold_in(key, number), (rows, rank)) / rows**0.5
            own[path.replace("/", ".")] = {"a": a, "b": jnp.zeros((rank, w.size // rows))}
        return {**jax.tree.map(jnp.array, dict(variables)), "params": own}

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        inside = {**variables, "params": merged(variables["frozen"]["base"], variables["params"])}
        return model.apply(inside, inputs, train=train, key=key, **({} if axis is None else {"axis": axis}))

    base = jt.Frozen(variables["params"])
    return dataclasses.replace(model, init=init, apply=apply, stages=(), frozen={"base": base})


def merged(base, delta):
    """Returns the base's parameters with a delta added."""

    def moved(path, w):
        own = delta.get(jt.tree.path_of(path).replace("/", "."))
        return w if own is None else w + (own["a"] @ own["b"]).reshape(w.shape)

    return jax.tree_util.tree_map_with_path(moved, base)
