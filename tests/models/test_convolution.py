import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.models import convolution


def loops(x, kernel, stride):
    """The definition of a convolution, pixel by pixel."""
    size, out = kernel.shape[0], []
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for i in range(0, x.shape[1] - size + 1, stride):
        row = [
            np.einsum("bijc,ijcd->bd", x[:, i : i + size, j : j + size], kernel)
            for j in range(0, x.shape[2] - size + 1, stride)
        ]
        out.append(np.stack(row, 1))
    return np.stack(out, 1)


@pytest.mark.parametrize("form", [convolution._by_patches, convolution._by_convolution])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (6, 6, 3),
        pytest.param(7, 5, 3, marks=pytest.mark.slow),
        (1, 2, 3),
        (5, 4, 1),
        pytest.param(8, 6, 5, marks=pytest.mark.slow),
    ],
)
def test_it_is_a_convolution(rng, form, stride, height, width, size):
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 3, 4)).astype(np.float32)
    form = jax.jit(form, static_argnums=2)
    np.testing.assert_allclose(form(x, kernel, stride), loops(x, kernel, stride), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[200, 0], ids=["few", "many"])
def many(request, monkeypatch):
    """Both forms of the product with the patches, whatever their number."""
    monkeypatch.setattr(convolution, "_MANY", request.param)


@pytest.mark.usefixtures("x64", "many")
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_formulations_agree_in_second_derivatives(rng, stride):
    x, kernel, direction = (rng.normal(size=shape) for shape in ((2, 5, 6, 2), (3, 3, 2, 3), (3, 3, 2, 3)))

    def curvature(form):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(form(x, kernel, stride)) ** 2)

        def along(x, kernel):
            return jnp.sum(jax.grad(loss, 1)(x, kernel) * direction)

        return loss(x, kernel), jax.grad(loss, (0, 1))(x, kernel), jax.grad(along, (0, 1))(x, kernel)

    first, second = jax.jit(lambda: [curvature(f) for f in (convolution._by_patches, convolution._by_convolution)])()
    chex.assert_trees_all_close(first, second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_layer_has_the_parameters_of_a_convolution(rng, dtype):
    x = rng.normal(size=(2, 6, 6, 2)).astype(np.float32)
    layer = convolution.Conv(5, stride=2, dtype=dtype)
    variables = layer.init(jax.random.key(0), x)
    assert {k: v.shape for k, v in variables["params"].items()} == {"kernel": (3, 3, 2, 5), "bias": (5,)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    variables["params"]["bias"] = variables["params"]["bias"] + 1.5
    out = jax.jit(layer.apply)(variables, x)
    assert out.dtype == dtype
    expected = loops(x, np.asarray(variables["params"]["kernel"]), 2) + 1.5
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected, rtol=0.05, atol=0.05 if dtype == jnp.bfloat16 else 1e-4
    )


def halved_by_loops(x, kernel):
    """Without padding, and the largest of each 2 × 2 tile."""
    pad = kernel.shape[0] // 2
    whole = loops(x, kernel, 1)[:, pad : x.shape[1] - pad, pad : x.shape[2] - pad]
    rows, columns = whole.shape[1] // 2, whole.shape[2] // 2
    tiles = whole[:, : 2 * rows, : 2 * columns].reshape(len(x), rows, 2, columns, 2, -1)
    return tiles.max((2, 4))


HALVED = [convolution._halved_by_patches, convolution._halved_by_convolution]


@pytest.mark.parametrize("form", HALVED)
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (8, 9, 3),
        (7, 6, 5),
        pytest.param(12, 12, 5, marks=pytest.mark.slow),
        pytest.param(4, 4, 1, marks=pytest.mark.slow),
    ],
)
def test_it_is_a_convolution_and_a_pooling(rng, form, height, width, size):
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(form)(x, kernel), halved_by_loops(x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("x64", "many")
def test_the_pooled_formulations_agree_in_their_gradients(rng):
    x, kernel = (rng.normal(size=shape) for shape in ((3, 9, 8, 2), (3, 3, 2, 3)))

    def gradients(form):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.tanh(form(x, kernel)) ** 2), (0, 1))(x, kernel)

    first, second = jax.jit(lambda: [gradients(form) for form in HALVED])()
    chex.assert_trees_all_close(first, second, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_steps_that_run_together_are_those_that_run_alone():
    """Bit for bit among the lengths of a call, and to rounding against steps on given batches."""
    image = np.random.default_rng(0).normal(size=(30, 8, 8, 1)).astype(np.float32)
    data = {"image": image, "label": (np.arange(30) % 3).astype(np.int32)}

    def sample(key, data):
        rows = jax.random.randint(key, (2, 6), 0, 30)
        episode = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), data)
        return {part: {key: x[:, half] for key, x in episode.items()} for part, half in PARTS.items()}

    objective = jt.maml(
        jt.classification(jt.models.conv4(3, width=4, pooling=False, norm=False)),
        inner=optax.sgd(0.1),
        steps=1,
        at_once=1,
    )
    optimizer, key = optax.sgd(0.1), jax.random.key(1)
    batch = jax.jit(sample)(key, data)
    ends = []
    for length in (1, 3):
        step = jt.train_step(objective, optimizer, sample=sample, steps_per_call=length)
        state = jt.init(objective, optimizer, key, batch)
        for _ in range(3 // length):
            state, _ = step(state, data)
        ends.append(jax.tree.map(np.asarray, state.params))
    jax.tree.map(lambda *leaves: [np.testing.assert_array_equal(leaves[0], leaf) for leaf in leaves[1:]], *ends)

    plain = jt.train_step(objective, optimizer)
    state = jt.init(objective, optimizer, key, batch)
    for number in range(3):
        drawn = jax.jit(sample)(jt.objective.named_key(jax.random.fold_in(key, number), "sample"), data)
        state, _ = plain(state, drawn)
    for ours, other in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(other, ours, atol=1e-5 * max(np.abs(ours).max(), 0.1))


PARTS = {"support": slice(0, 3), "query": slice(3, 6)}
