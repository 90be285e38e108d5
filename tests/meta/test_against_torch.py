"""The meta-gradient of Conv4 is PyTorch's, by the loop that learn2learn runs: where PyTorch is installed."""

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'jaxtransfer[torch]'")
LAYERS = [f"stage{i}_{kind}" for i in range(1, 5) for kind in ("conv", "norm")]


def weights(params):
    """The weights in PyTorch's layout, in the order of the layers."""
    out = []
    for layer in LAYERS:
        own = params[layer]
        first = np.transpose(own["kernel"], (3, 2, 0, 1)) if "kernel" in own else own["scale"]
        out += [first, own["bias"]]
    return [*out, np.asarray(params["head"]["kernel"]).T, params["head"]["bias"]]


def forward(p, x, pooled):
    for i in range(0, 16, 4):
        x = torch.nn.functional.conv2d(x, p[i], p[i + 1], stride=1 if pooled else 2, padding=1)
        x = torch.relu(torch.nn.functional.batch_norm(x, None, None, p[i + 2], p[i + 3], training=True))
        if pooled and min(x.shape[2:]) > 1:
            x = torch.nn.functional.max_pool2d(x, 2)
    return torch.nn.functional.linear(x.permute(0, 2, 3, 1).flatten(1), p[16], p[17])


def theirs(params, batch, rate, steps, first_order, pooled):
    p = [torch.tensor(np.array(w)).requires_grad_() for w in weights(params)]
    count = batch["support"]["label"].shape[0]

    def loss(fast, part, task):
        image = torch.tensor(batch[part]["image"][task]).permute(0, 3, 1, 2)
        label = torch.tensor(batch[part]["label"][task]).long()
        return torch.nn.functional.cross_entropy(forward(fast, image, pooled), label)

    value = 0.0
    for task in range(count):
        fast = [w.clone() for w in p]
        for _ in range(steps):
            gradients = torch.autograd.grad(loss(fast, "support", task), fast, create_graph=not first_order)
            fast = [w - rate * g for w, g in zip(fast, gradients, strict=True)]
        query = loss(fast, "query", task) / count
        query.backward()
        value += query.item()
    return value, [w.grad.numpy() for w in p]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("steps", "first_order", "pooled"), [(1, False, False), (3, False, False), (1, True, False), (1, False, True)]
)
def test_the_meta_gradient(rng, steps, first_order, pooled):
    def part(count):
        image = rng.random((3, count, 14, 14, 1))
        return {"image": image, "label": rng.permuted(np.tile(np.arange(count, dtype=np.int32) % 3, (3, 1)), axis=1)}

    batch = {"support": part(6), "query": part(9)}
    objective = jt.maml(
        jt.classification(jt.models.conv4(3, width=8, pooling=pooled, param_dtype=np.float64)),
        inner=optax.sgd(0.1),
        steps=steps,
        first_order=first_order,
        at_once=1,
    )
    params, state = objective.init(jax.random.key(0), batch)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: objective(p, state, batch, jt.Context())[0]))(params)
    expected, gradients = theirs(params["model"], batch, 0.1, steps, first_order, pooled)
    assert float(value) == pytest.approx(expected, rel=1e-9)
    norm = np.sqrt(sum(float(np.sum(g**2)) for g in gradients))
    for ours, other in zip(weights(gradient["model"]), gradients, strict=True):
        scale = max(np.abs(other).max(), 1e-3 * norm)  # the bias before batch norm has no gradient
        assert np.abs(ours - other).max() <= 1e-8 * scale
