"""A mask is one finite, non-negative weight per example; anything else is refused, wherever it is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)
B = 6


def init(key, x):
    return {"params": {"w": jax.random.normal(key, (5, 3))}}


def apply(variables, x, *, train, key):
    z = x @ variables["params"]["w"]
    return {"projection": z, "prediction": 2 * z, "logits": z, "features": z}, {}


NET = jt.Model(init, apply, name="net")
TEACHER = jt.frozen(NET.named("teacher"), init(jax.random.key(1), None))
OBJECTIVES = {
    "classification": lambda: jt.classification(NET),
    "regression": lambda: jt.regression(NET, view="image", target="value"),
    "distillation": lambda: jt.distillation(NET, TEACHER),
    "distillation of a batch": lambda: jt.distillation(NET, TEACHER, loss=jt.losses.rkd_distance),
    "mean teacher": lambda: jt.mean_teacher(NET),
    "mutual": lambda: jt.mutual_learning([NET, NET.named("other")]),
    "crd": lambda: jt.crd(NET, TEACHER, examples=9, dim=2, negatives=2),
    "probe": lambda: jt.online_probe(NET, 3),
    "simclr": lambda: jt.simclr(NET),
    "siglip": lambda: jt.siglip(NET),
    "barlow twins": lambda: jt.barlow_twins(NET),
    "byol": lambda: jt.byol(NET),
    "moco": lambda: jt.moco(NET, queue=8),
    "nnclr": lambda: jt.nnclr(NET, queue=8),
    "swav": lambda: jt.swav(NET, prototypes=3),
    "dino": lambda: jt.dino(NET),
    "cosine": lambda: jt.meta.cosine_classification(NET, classes=3),
    "a part": lambda: jt.classification(NET).on("part"),
}


def a_batch(mask=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, 5)).astype(np.float32)
    batch = {"image": x, "image2": x[:, ::-1].copy(), "value": x[:, :3].copy(), "label": rng.integers(0, 3, B)}
    batch["index"] = np.arange(B)
    if mask is not None:
        batch["mask"] = mask
    return {**batch, "part": dict(batch)}


ONES = np.ones(B, np.float32)
MISSHAPED = {
    "[B, 1]": ONES[:, None],
    "[1]": ONES[:1],
    "[B - 1]": ONES[:-1],
    "[1, B]": ONES[None],
    "[B, B]": np.ones((B, B)),
    "scalar": np.float32(1),
}
BAD = {"negative": -1.0, "nan": np.nan, "infinite": np.inf, "a little negative": -1e-30}


def spoilt(value):
    return np.where(np.arange(B) == 2, value, 1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_mask_of_another_shape_is_refused_by_every_objective(name):
    objective = OBJECTIVES[name]()
    state = jt.init(objective, optax.sgd(0.1), KEY, a_batch())
    step = jt.train_step(objective, optax.sgd(0.1))
    for mask in MISSHAPED.values():
        wrong = jax.tree.map(jnp.asarray, a_batch(mask))  # as a program sees it: no values
        with pytest.raises(jt.InputError, match=r"mask must have one entry|leading batch dimension"):
            jax.eval_shape(lambda p, s, b: objective(p, s, b, jt.Context(key=KEY)), state.params, state.state, wrong)
        for see in (lambda b: jt.init(objective, optax.sgd(0.1), KEY, b), lambda b: step(state, b)):
            with pytest.raises(jt.InputError, match=r"mask must have one entry|leading batch dimension"):
                see(a_batch(mask))


def test_examples_without_labels_may_lie_beside_those_of_the_mask():
    """A mask of B examples is no mask of 3 B others; the objective of the labelled ones takes it as without them."""
    batch = a_batch(spoilt(0.0))
    beside = {**batch, "unlabelled": np.zeros((3 * B, 5), np.float32)}
    objective = jt.classification(NET)
    state = jt.init(objective, optax.sgd(0.1), KEY, beside)
    assert jt.evaluate(objective, state, [beside]) == jt.evaluate(objective, state, [batch])
    for mask in (ONES[:1], ONES[:-1], ONES[:, None], np.ones((3 * B, 1))):
        with pytest.raises(jt.InputError, match="mask must have one entry"):
            jt.init(objective, optax.sgd(0.1), KEY, {**beside, "mask": mask})


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_values_that_are_no_weights_are_refused_where_they_are_seen(value):
    objective, bad, good = jt.classification(NET), a_batch(spoilt(value)), a_batch(ONES)
    state = jt.init(objective, optax.sgd(0.1), KEY, good)
    episodes = {part: jax.tree.map(lambda x: x[None], bad) for part in ("support", "query")}
    few_shot = jt.meta.prototypical(NET, ways=3, output="features")
    batches = iter([good, good, bad])
    for see in (
        lambda: jt.init(objective, optax.sgd(0.1), KEY, bad),
        lambda: jt.init(objective, optax.sgd(0.1), KEY, jax.tree.map(jnp.asarray, bad)),
        lambda: jt.init(few_shot, optax.sgd(0.1), KEY, episodes),
        lambda: jt.train_step(objective, optax.sgd(0.1))(state, bad),
        lambda: jt.evaluate(objective, state, [bad]),
        lambda: jt.fisher_diagonal(objective, state.params, state.state, [bad]),
        lambda: jt.evaluate_episodes(few_shot, state, [episodes]),
        lambda: jt.representation.embed(NET, {"params": state.params["net"]}, [bad]),
        lambda: jt.fit(objective, optax.sgd(0.1), batches, steps=3, progress=False),
        lambda: jt.losses.rkd_distance(bad["image"], bad["image"], mask=bad["mask"]),
        lambda: jt.losses.nt_xent(bad["image"], bad["image"], mask=jnp.asarray(bad["mask"])),
    ):
        with pytest.raises(jt.InputError, match="mask must be finite and not negative"):
            see()


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_inside_of_a_program_they_make_the_loss_nan_and_not_zero(value):
    objective = jt.classification(NET)
    state = jt.init(objective, optax.sgd(0.1), KEY, a_batch(ONES))
    on_device = jax.tree.map(jnp.asarray, a_batch(spoilt(value)))
    loss = jax.jit(lambda batch: objective(state.params, state.state, batch, jt.Context(key=KEY))[0])(on_device)
    assert np.isnan(float(loss))


@pytest.mark.parametrize("dtype", [bool, np.int32, np.int8, np.float16, jnp.bfloat16, np.float64])
def test_booleans_and_whole_numbers_are_masks(dtype):
    keep, objective = np.arange(B) % 2, jt.classification(NET) + jt.barlow_twins(NET)
    params, state = objective.init(KEY, a_batch())
    run = jax.jit(lambda *given: objective(*given, jt.Context(key=KEY)))
    loss, _, metrics = run(params, state, a_batch(keep.astype(dtype)))
    few = jax.tree.map(lambda x: x[keep > 0], a_batch())
    expected, _, _ = run(params, state, few)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert metrics["accuracy"].count.dtype == np.float32
    nothing, _, _ = run(params, state, a_batch(np.zeros(B, dtype)))
    assert float(nothing) == 0


def test_a_mask_of_words_is_refused():
    with pytest.raises(jt.InputError, match="mask must be numbers or booleans"):
        jt.init(jt.classification(NET), optax.sgd(0.1), KEY, a_batch(np.full(B, 1j)))
