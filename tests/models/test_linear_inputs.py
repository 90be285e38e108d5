"""What linear layers see: their outputs are these rows times their kernels, whatever the layer and its padding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

RNG = np.random.default_rng(0)


class Odd(nn.Module):
    """Convolutions of all paddings, a dense layer over two axes, layers that are left out."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Conv(4, (3, 2), strides=2, padding="SAME", name="same")(x)
        x = nn.Conv(3, (2, 2), padding="VALID", name="valid")(x)
        x = nn.Conv(2, (3, 3), padding=((2, 0), (1, 1)), use_bias=False, name="pairs")(x)
        x = nn.Conv(4, (3, 3), padding="CIRCULAR", name="circular")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(4, (3, 3), kernel_dilation=2, name="dilated")(x)
        twice = nn.Dense(4, name="twice")
        x = twice(nn.relu(twice(x)))
        x = nn.DenseGeneral((2, 3), axis=(-2, -1), name="general")(x)
        return {"logits": nn.Dense(3, name="head")(x.reshape(len(x), -1))}


def outputs_of(model, variables, inputs):
    """What each layer gives, by the path of its kernel, without its bias."""
    found = {}

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            found["/".join((*context.module.path, "kernel"))] = out
        return out

    @jax.jit
    def apply(variables, inputs):
        with nn.intercept_methods(intercept):
            model.apply(variables, inputs, train=False, key=None)
        return {path: out for path, out in found.items() if path in leaves}

    leaves = {path: np.asarray(leaf) for path, leaf in jt.tree.leaves_by_path(variables["params"]).items()}
    given = jax.device_get(apply(variables, inputs))
    return {path: out - leaves.get(path.replace("kernel", "bias"), 0) for path, out in given.items()}


def moved(model, shape):
    """Variables with biases that are not 0, and inputs."""
    inputs = RNG.normal(size=shape).astype(np.float32)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), inputs))

    def changed(leaf):
        return leaf + np.float32(0.1) * RNG.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(changed, variables), inputs


MODELS = {
    "odd": (jt.models.linen(Odd()), (2, 9, 8, 2), {"same", "valid", "pairs", "general", "head"}),
    "small cnn": (
        jt.models.normalize(jt.models.small_cnn(3, width=2), 0.4, 0.3),
        (2, 6, 6, 1),
        {"stem_conv", "stage1_conv", "stage2_conv", "head"},
    ),
    "conv4": (jt.models.conv4(3, width=4), (2, 16, 16, 1), {*(f"stage{n}_conv" for n in (1, 2, 3, 4)), "head"}),
    "vit": (
        jt.models.vit(8, 1, 2, 3, patch=4),
        (2, 8, 8, 1),
        {"stem_conv", *(f"stage1/{n}" for n in ("fc1", "fc2")), "head"}
        | {f"stage1/attention/{name}" for name in ("query", "key", "value", "out")},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "conv4" else name for name in MODELS]
)
def test_rows_times_the_kernel_are_the_output(name):
    model, shape, layers = MODELS[name]
    variables, inputs = moved(model, shape)
    seeing = jt.models.linear_inputs(model)
    seen, state = jax.jit(lambda v, x: seeing.apply(v, x, train=False, key=None))(variables, inputs)
    assert set(seen) == {f"{layer}/kernel" for layer in layers}
    assert jax.tree.structure(state) == jax.tree.structure({k: v for k, v in variables.items() if k != "params"})
    given, kernels = outputs_of(model, variables, inputs), jt.tree.leaves_by_path(variables["params"])
    for path, rows in seen.items():
        kernel = np.asarray(kernels[path])
        product = np.asarray(rows) @ kernel.reshape(rows.shape[-1], -1)
        np.testing.assert_allclose(product.reshape(given[path].shape), given[path], atol=2e-5, err_msg=path)


def test_regmean_of_a_convolution_is_the_least_squares_fit():
    """Of one layer the merged kernel answers both models' inputs best: the normal equations, by NumPy."""
    model = jt.models.small_cnn(2, width=2)
    variables = [moved(model, (1, 6, 6, 1))[0] for _ in range(2)]
    data = [[{"image": RNG.normal(size=(3, 6, 6, 1)).astype(np.float32)}] for _ in range(2)]
    path, seen = "stem_conv/kernel", jt.models.linear_inputs(model)
    grams = [
        jt.fusion.gram_matrices(seen, v, batches, {path: path}) for v, batches in zip(variables, data, strict=True)
    ]
    found = np.asarray(jt.fusion.regmean(variables, grams, off_diagonal=1.0)["params"]["stem_conv"]["kernel"])
    left, right = np.zeros((9, 9)), np.zeros((9, 2))
    for own, ((batch,),) in zip(variables, zip(data), strict=True):
        image = np.pad(batch["image"][..., 0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
        rows = np.array([one[i : i + 3, j : j + 3].reshape(-1) for one in image for i in range(6) for j in range(6)])
        kernel = np.asarray(own["params"]["stem_conv"]["kernel"], np.float64).reshape(9, 2)
        left, right = left + rows.T @ rows / len(rows), right + rows.T @ rows @ kernel / len(rows)
    np.testing.assert_allclose(found.reshape(9, 2), np.linalg.solve(left, right), atol=1e-5)


def test_a_model_without_such_layers_is_refused():
    plain = jt.Model(lambda key, x: {"params": {}}, lambda v, x, *, train, key: ({"logits": x}, {}))
    with pytest.raises(jt.InputError, match="no linear layer of Linen"):
        jt.models.linear_inputs(plain).apply({"params": {}}, jnp.ones((1, 2)), train=False, key=None)
