"""What the linear layers of a network see: the inputs of its dense layers, and the patches of its convolutions."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given
from jaxtransfer.models.convolution import Conv, ConvHalve
from jaxtransfer.models.layers import kept_whole


def linear_inputs(model: Model) -> Model:
    """Returns the model with what its linear layers see as outputs, by the path of the kernel.

    For `jt.fusion.regmean`, which takes each of these layers as a matrix:

        seen = jt.models.linear_inputs(model)
        paths = jt.shapes_of(jt.Forward.of(seen), batch)  # or those that are wanted
        grams = [jt.fusion.gram_matrices(seen, v, batches, {path: path for path in paths}) for v in runs]

    A dense layer sees x [B, ..., D], a convolution the patch [k · k · C] at each place of its output, in the order of
    its kernel [k, k, C, D]: the output is the product of these rows and the kernel, and a bias. Layers are those of
    Linen (`Dense`, `DenseGeneral`, `Conv` that is not grouped, attention's) and of this library. Left out are layers
    that are called more than once, and those whose kernel doesn't lie at their own path in the model's parameters.

    Args:
      model: the model; in inference mode.

    Returns:
      A model of the same parameters, whose outputs are those rows alone.

    Raises:
      InputError: when applied, where nothing of the model is such a layer.
    """

    def apply(variables, inputs, *, train, key, axis=None):
        seen: dict[str, Any] = {}
        called: dict[str, int] = {}

        def intercept(call, args, kwargs, context):
            if context.method_name == "__call__" and args:
                path = "/".join((*context.module.path, "kernel"))
                rows = _rows(context.module, args[0])
                if rows is not None:
                    seen[path], called[path] = rows, called.get(path, 0) + 1
            return call(*args, **kwargs)

        with kept_whole(), nn.intercept_methods(intercept):
            _, state = model.apply(variables, inputs, train=train, key=key, **given(axis=axis))
        shapes = {path: leaf.shape for path, leaf in tree.leaves_by_path(variables["params"]).items()}
        found = {
            path: rows
            for path, rows in seen.items()
            if called[path] == 1 and path in shapes and _is_of(rows, shapes[path])
        }
        if not found:
            raise InputError(
                f"model {model.name!r} has no linear layer of Linen, so nothing tells what its kernels see"
            )
        return found, state

    return Model(model.init, apply, model.name, frozen=model.frozen)


def _is_of(rows: Any, shape: tuple[int, ...]) -> bool:
    """Whether rows are of a kernel of this shape: its first axes are theirs."""
    return rows.shape[-1] in (math.prod(shape[:axes]) for axes in range(1, len(shape)))


def _rows(module: nn.Module, x: Any) -> Any:
    """Returns what a layer sees, [B, ..., D]; None for what is no linear layer, or one of another making."""
    if isinstance(module, nn.Dense):
        return x
    if isinstance(module, nn.DenseGeneral):
        last_axes: Any = module.axis
        axes = (last_axes,) if isinstance(last_axes, int) else tuple(last_axes)
        last = tuple(range(-len(axes), 0))
        if module.batch_dims or tuple(axis if axis < 0 else axis - x.ndim for axis in axes) != last:
            return None
        return x.reshape(*x.shape[: x.ndim - len(axes)], -1)
    size: tuple[int, ...]
    padding: Any
    if isinstance(module, Conv):
        size, strides, padding = (module.size,) * 2, (module.stride,) * 2, [(module.size // 2,) * 2] * 2
    elif isinstance(module, ConvHalve):
        size, strides, padding = (module.size,) * 2, (1, 1), [(0, 0)] * 2
    elif isinstance(module, nn.Conv):
        plain = module.feature_group_count == 1 and module.mask is None
        size, strides = _each(module.kernel_size), _each(module.strides)
        padding = _pads(module.padding, x.shape[1:-1], size, strides)
        if not plain or x.ndim != 4 or len(size) != 2 or padding is None:
            return None
        if _each(module.input_dilation) != (1, 1) or _each(module.kernel_dilation) != (1, 1):
            return None
    else:
        return None
    return _patches(x, size, strides, padding)


def _patches(x: Any, size: tuple[int, ...], strides: tuple[int, ...], padding: Any) -> Any:
    """Returns the patch at each place, [B, H', W', k · k · C]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((x.shape[i + 1] - size[i]) // strides[i] + 1 for i in (0, 1))

    def shifted(i: int, j: int) -> Any:
        down, right = (
            slice(n, n + s * (many - 1) + 1, s) for n, s, many in zip((i, j), strides, (rows, columns), strict=True)
        )
        return x[:, down, right]

    return jnp.concatenate([shifted(i, j) for i in range(size[0]) for j in range(size[1])], axis=-1)


def _each(value: Any) -> tuple[int, ...]:
    """Returns a number for both axes, as Linen reads what may be one number, several or none."""
    return (1, 1) if value is None else (value,) * 2 if isinstance(value, int) else tuple(value)


def _pads(
    padding: Any, shape: tuple[int, ...], size: tuple[int, ...], strides: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """Returns the zeros before and after each axis; None for padding by anything else."""
    if isinstance(padding, str):
        return list(jax.lax.padtype_to_pads(shape, size, strides, padding)) if padding in ("SAME", "VALID") else None
    pairs = [padding] * 2 if isinstance(padding, int) else list(padding)
    return [(one, one) if isinstance(one, int) else tuple(one) for one in pairs]
