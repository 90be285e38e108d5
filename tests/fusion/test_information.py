"""Fisher merging and RegMean: what data say about the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusion_trees import assert_close, assert_params, flat, network

import jaxtransfer as jt

F = jt.fusion
BASE = network(0)
MODELS = [network(seed, near=BASE) for seed in (1, 2, 3)]


def drawn(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (rng.uniform(size=leaf.shape) ** 4 * seed).astype(np.float32), BASE["params"])


FISHERS = [drawn(seed) for seed in (1, 5, 9)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_fisher(normalize, weights):
    shares = np.array(weights or [1 / 3] * 3)
    if normalize:
        lengths = np.array(
            [np.sqrt(sum((leaf.astype(float) ** 2).sum() for leaf in flat(f).values())) for f in FISHERS]
        )
        inverse = 1 / (lengths + 1e-3)
        shares = shares * inverse / inverse.sum()
    expected = {}
    for path in flat(BASE["params"]):
        values = [flat(m["params"])[path].astype(float) for m in MODELS]
        told = [flat(f)[path].astype(float) + 1e-3 for f in FISHERS]
        top = sum(a * f * w for a, f, w in zip(shares, told, values, strict=True))
        expected[path] = top / sum(a * f for a, f in zip(shares, told, strict=True))
    found = F.fisher(MODELS, FISHERS, weights=weights, normalize=normalize, floor=1e-3)
    assert_params(found, expected)
    whole = [{"params": one, "batch_stats": BASE["batch_stats"]} for one in FISHERS]
    assert_close(F.fisher(MODELS, whole, weights=weights, normalize=normalize, floor=1e-3), found)
    bare = F.fisher([m["params"] for m in MODELS], FISHERS, weights=weights, normalize=normalize, floor=1e-3)
    assert_close(bare, found["params"])
    order = [2, 0, 1]
    turned = F.fisher([MODELS[n] for n in order], [FISHERS[n] for n in order], normalize=normalize, floor=1e-3,
                      weights=None if weights is None else [weights[n] for n in order])  # fmt: skip
    assert_close(turned["params"], found["params"])


def test_fisher_of_nothing_is_the_mean():
    zeros = [jax.tree.map(np.zeros_like, own) for own in FISHERS]
    assert_close(F.fisher(MODELS, zeros), F.average(MODELS))


def test_regmean_is_the_least_squares_fit():
    rng = np.random.default_rng(2)
    inputs = [rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8)) for _ in MODELS]
    grams = [{"head/kernel": F.gram(x)} for x in inputs]
    kernels = [m["params"]["head"]["kernel"].astype(float) for m in MODELS]
    outputs = np.concatenate([x @ kernel for x, kernel in zip(inputs, kernels, strict=True)])
    fit, *_ = np.linalg.lstsq(np.concatenate(inputs), outputs)
    found = F.regmean(MODELS, grams, off_diagonal=1)
    np.testing.assert_allclose(found["params"]["head"]["kernel"], fit, atol=1e-5)
    mean = F.average(MODELS)
    np.testing.assert_allclose(found["params"]["stem"]["kernel"], mean["params"]["stem"]["kernel"], atol=1e-6)
    np.testing.assert_allclose(found["params"]["head"]["bias"], mean["params"]["head"]["bias"], atol=1e-6)

    shrunk = [own["head/kernel"] * (0.7 + 0.3 * np.eye(8)) for own in grams]  # the released form
    expected = np.linalg.inv(sum(shrunk)) @ sum(g @ w for g, w in zip(shrunk, kernels, strict=True))
    found = F.regmean(MODELS, grams, off_diagonal=0.7)
    np.testing.assert_allclose(found["params"]["head"]["kernel"], expected, atol=1e-5)
    bare = F.regmean([m["params"] for m in MODELS], grams, off_diagonal=0.7)
    assert_close(bare, found["params"])
    full = [{f"params/{path}": gram for path, gram in own.items()} for own in grams]
    assert_close(F.regmean(MODELS, full, off_diagonal=0.7), found)


def test_inputs_that_never_come_leave_the_mean():
    gram = np.diag([1.0] * 5 + [0.0] * 3)
    found = F.regmean(MODELS, [{"head/kernel": gram * n} for n in (1, 2, 3)])["params"]["head"]["kernel"]
    kernels = np.array([m["params"]["head"]["kernel"] for m in MODELS], float)
    np.testing.assert_allclose(found[5:], kernels.mean(0)[5:], atol=1e-6)
    np.testing.assert_allclose(found[:5], np.average(kernels, axis=0, weights=[1, 2, 3])[:5], atol=1e-6)


def test_kernels_of_more_axes_are_matrices():
    rng = np.random.default_rng(0)
    models = [{"kernel": rng.normal(size=(2, 3, 4))} for _ in range(2)]
    for rows in (2, 6):
        grams = [{"kernel": F.gram(rng.normal(size=(9, rows)))} for _ in models]
        flats = [{"kernel": m["kernel"].reshape(rows, -1)} for m in models]
        found, expected = F.regmean(models, grams)["kernel"], F.regmean(flats, grams)["kernel"]
        np.testing.assert_allclose(found.reshape(rows, -1), expected)


def test_gram_matrices_are_collected():
    model = jt.models.mlp(3, hidden=(5,))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 2, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 2, 3)))
    seen = {"stage1/kernel": lambda outputs, image: image.reshape(len(image), -1), "head/kernel": "features",
            "rows": lambda outputs, image: image}  # fmt: skip
    mask = np.array([1, 1, 1, 0], np.float32)
    broken = np.where(mask[:, None, None] > 0, x[4:], np.nan).astype(np.float32)
    found = F.gram_matrices(model, variables, [{"image": x[:4]}, {"image": broken, "mask": mask}], seen)
    rows = x[:7].reshape(7, -1).astype(float)
    params = jax.tree.map(np.asarray, variables["params"])
    features = np.maximum(rows @ params["stage1"]["kernel"] + params["stage1"]["bias"], 0)
    for path, expected in (("stage1/kernel", rows), ("head/kernel", features), ("rows", rows.reshape(14, 3))):
        np.testing.assert_allclose(found[path], expected.T @ expected / len(expected), atol=1e-5)
    with pytest.raises(jt.InputError, match="unknown output 'featurs'"):
        F.gram_matrices(model, variables, [{"image": x}], {"head/kernel": "featurs"})
    with pytest.raises(jt.InputError, match="got none"):
        F.gram_matrices(model, variables, [], seen)
