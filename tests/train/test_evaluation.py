"""Evaluation counts each example once: against NumPy over the whole set, padded or not, on any place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(5)


@pytest.fixture
def task(rng):
    """A trained-looking linear classifier of seven classes and 21 examples."""
    model = jt.models.mlp(7, hidden=())
    images = rng.normal(size=(21, 5)).astype(np.float32)
    labels = rng.integers(0, 7, 21).astype(np.int32)
    params, state = jt.classification(model).init(KEY, {"image": images, "label": labels})
    params = jax.tree.map(lambda w: w + jnp.asarray(rng.normal(size=w.shape), w.dtype), params)
    return model, jt.TrainState.of(params, state), images, labels


def numpy_metrics(params, images, labels):
    weight, bias = (np.asarray(params["model"]["head"][k], np.float64) for k in ("kernel", "bias"))
    losses, hits, top5 = [], [], []
    for x, y in zip(images, labels, strict=True):
        logits = x.astype(np.float64) @ weight + bias
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[y])
        rank = sum(value > logits[y] for value in logits)
        hits.append(rank == 0)
        top5.append(rank < 5)
    return {"classification": np.mean(losses), "accuracy": np.mean(hits), "top5": np.mean(top5)}


def padded(images, labels, size, *, poison=0.0):
    batches = []
    for start in range(0, len(images), size):
        image, label = images[start : start + size], labels[start : start + size]
        missing = size - len(image)
        mask = np.r_[np.ones(len(image)), np.zeros(missing)].astype(np.float32)
        image = np.concatenate([image, np.full((missing, *image.shape[1:]), poison, image.dtype)])
        batches.append({"image": image, "label": np.r_[label, np.full(missing, -1)].astype(np.int32), "mask": mask})
    return batches


@pytest.mark.parametrize("size", [1, 4, 8, 21, 64])
def test_padding_changes_nothing(task, size):
    model, state, images, labels = task
    want = numpy_metrics(state.params, images, labels)
    for poison in (0.0, 1e6, np.nan):
        got = jt.evaluate(jt.classification(model), state, padded(images, labels, size, poison=poison))
        assert set(got) == {"loss", *want}
        assert got == pytest.approx({**want, "loss": want["classification"]}, rel=1e-5)
        assert all(type(value) is float for value in got.values())


def test_batches_of_uneven_size_without_a_mask(task):
    model, state, images, labels = task
    batches = [{"image": images[s], "label": labels[s]} for s in (slice(0, 3), slice(3, 18), slice(18, 21))]
    want = numpy_metrics(state.params, images, labels)
    got = jt.evaluate(jt.classification(model), state, iter(batches))
    assert got == pytest.approx({**want, "loss": want["classification"]}, rel=1e-5)


def test_penalties_weights_and_schedules_count_in_the_loss(task):
    model, state, images, labels = task
    objective = 2 * jt.classification(model) + (lambda step: 0.1 * step) * jt.l2()
    got = jt.evaluate(objective, state._replace(step=jnp.int32(3)), padded(images, labels, 8))
    want = numpy_metrics(state.params, images, labels)
    penalty = 0.5 * sum((np.asarray(w, np.float64) ** 2).sum() for w in jax.tree.leaves(state.params))
    assert got["l2"] == pytest.approx(penalty, rel=1e-5)
    assert got["classification"] == pytest.approx(want["classification"], rel=1e-5)
    assert got["loss"] == pytest.approx(2 * want["classification"] + 0.3 * penalty, rel=1e-5)


@pytest.mark.parametrize(("shape", "mode"), [((4,), "jit"), ((2, 2), "jit"), ((4,), "pmap"), (None, "pmap")])
def test_mesh_and_pmap_agree(task, mesh_of, shape, mode):
    model, state, images, labels = task
    want = numpy_metrics(state.params, images, labels)
    anchor = jax.tree.map(lambda w: w + 1.0, state.params)
    objective = jt.classification(model) + jt.l2_sp(anchor)
    mesh = None if shape is None else mesh_of(*shape)
    run = jt.eval_step(objective, mesh=mesh, mode=mode)
    for _ in range(2):
        got = run(state, padded(images, labels, 8))
        scalars = jt.tree.count(anchor)
        want |= {"l2_sp": scalars / 2, "loss": want["classification"] + scalars / 2}
        assert got == pytest.approx(want, rel=1e-5)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, anchor)))


@pytest.mark.parametrize("leaves", [1, 2, 3])
def test_pmap_with_few_leaves(rng, mesh_of, leaves):
    """JAX 0.10 misreads flat `in_axes` where the arguments have as many leaves as there are arguments."""
    params = {"model": {str(i): jnp.ones((3, 4)) for i in range(leaves)}}
    model = jt.Model(
        lambda key, x: {"params": params["model"]},
        lambda v, x, *, train, key: ({"logits": x @ sum(jax.tree.leaves(v["params"]))}, {}),
    )
    batch = {"image": rng.normal(size=(8, 3)).astype(np.float32), "label": np.arange(8) % 4}
    for extra in ({}, {"mask": np.ones(8, np.float32)}):
        got = jt.evaluate(
            jt.classification(model), jt.TrainState.of(params), [{**batch, **extra}], mesh=mesh_of(4), mode="pmap"
        )
        assert got["loss"] == pytest.approx(np.log(4), rel=1e-5)


@pytest.mark.slow
def test_inference_mode(rng):
    """Running statistics are used and stay; nothing is drawn."""
    seen = []
    base = jt.models.small_cnn(3, width=2)

    def apply(variables, inputs, *, train, key, axis=None):
        seen.append((train, key))
        return base.apply(variables, inputs, train=train, key=key, axis=axis)

    model = jt.Model(base.init, apply, base.name, base.stages)
    batch = {"image": rng.normal(size=(4, 4, 4, 1)).astype(np.float32), "label": np.zeros(4, np.int32)}
    state = jt.init(jt.classification(model), optax.sgd(0.1), KEY, batch)
    seen.clear()
    one = jt.evaluate(jt.classification(model), state, [batch])
    assert seen == [(False, None)]
    each = [
        jt.evaluate(jt.classification(model), state, [{k: v[i : i + 1] for k, v in batch.items()}]) for i in range(4)
    ]
    assert one["loss"] == pytest.approx(np.mean([m["loss"] for m in each]), rel=1e-5)


def test_nothing_to_evaluate(task):
    model, state, images, labels = task
    with pytest.raises(jt.InputError, match="at least one batch"):
        jt.evaluate(jt.classification(model), state, [])
    (batch,) = padded(images, labels, 21)
    nothing = {**batch, "mask": np.zeros(21, np.float32)}
    assert set(jt.evaluate(jt.classification(model), state, [nothing]).values()) == {0.0}
    got = jt.evaluate(jt.classification(model), state, [nothing, batch])
    assert got == pytest.approx(jt.evaluate(jt.classification(model), state, [batch]), rel=1e-6)
