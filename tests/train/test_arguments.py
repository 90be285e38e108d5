"""What is given to `fit`, `init` and `evaluate` by mistake is refused with the remedy, before anything is compiled."""

import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

IMAGES = np.arange(8 * 4, dtype=np.uint8).reshape(8, 2, 2, 1)
BATCH = {"image": IMAGES, "label": np.arange(8, dtype=np.int32) % 3}
DATASET = jt.data.Dataset.from_arrays(IMAGES, BATCH["label"])
NET = jt.models.mlp(3, hidden=(4,))
OBJECTIVE = jt.classification(NET)
SGD = optax.sgd(0.1)


def fitted(data=(BATCH, BATCH), objective=OBJECTIVE, optimizer=SGD, **more):
    return jt.fit(objective, optimizer, data, steps=2, **more)


@pytest.fixture(scope="module")
def state():
    return jt.init(OBJECTIVE, SGD, jax.random.key(0), BATCH)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (BATCH, r"got a dict, which is one: pass \[batch\]|got a dict, which is one: give \[batch\]"),
        (
            (IMAGES, BATCH["label"]),
            r"got a tuple of ndarray, ndarray: jt\.data\.(pipeline|eval_batches)\(jt\.data\.Data",
        ),
        (IMAGES, "got uint8 "),
        (DATASET, r"got a Dataset, which gives examples: jt\.data\.(pipeline|eval_batches)\(dataset, batch_size\)"),
        ("digits/upright", "got str 'digits/upright'"),
        (3, "got int '3'"),
    ],
)
def test_what_is_no_batches(state, data, why):
    with pytest.raises(jt.InputError, match=why):
        fitted(data)
    with pytest.raises(jt.InputError, match=why):
        fitted(eval_data=data)
    with pytest.raises(jt.InputError, match=why):
        jt.evaluate(OBJECTIVE, state, data)


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ((IMAGES, BATCH["label"]), "a batch is a dict of arrays"),
        ({**BATCH, "label": np.array(list("abcabcab"))}, "'label' is of <U1: number the classes"),
        ({**BATCH, "image": list(IMAGES)}, r"batch\['image'\] must be one array, got a list of ndarray"),
        ({name: entry[:0] for name, entry in BATCH.items()}, r"needs a row or more; 'image' has shape \(0, 2, 2, 1\)"),
    ],
)
def test_what_is_no_batch(batch, why):
    with pytest.raises(jt.InputError, match=why):
        jt.init(OBJECTIVE, SGD, jax.random.key(0), batch)
    with pytest.raises(jt.InputError, match=why):
        fitted([batch, batch])


def test_examples_are_no_batch_to_evaluate(state):
    with pytest.raises(jt.InputError, match="a batch is a dict of arrays"):
        jt.evaluate(OBJECTIVE, state, [(IMAGES, BATCH["label"])])


def test_a_batch_may_hold_several_arrays_in_one_entry_and_keys():
    """A term of one's own reads them: two crops as a tuple or a list, a key for each example."""
    x = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)

    def loss(outputs, params, state, batch, ctx):
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(batch["key"])
        return params["own"]["w"] * (sum(jnp.sum(crop) for crop in batch["crops"]) + 0 * noise.sum()), state, {}

    own = jt.Objective("own", (), loss, setup=lambda key, batch: ({"own": {"w": jnp.ones(())}}, {"own": {}}))
    keys = jax.random.split(jax.random.key(0), 8)
    for crops in ((x, x[:, :2]), [x, x[:, :2]]):
        run = fitted([{**BATCH, "crops": crops, "key": keys}] * 2, own, optax.sgd(0.0))
        assert run.history[-1]["train/loss"] == x.sum() + x[:, :2].sum()


class Loader:
    """Data of another library: its `dataset` and `batch_size` are not ours, and it has names of classes."""

    dataset, batch_size, class_names = object(), 4, ("a",)

    def read(self, rows):
        raise NotImplementedError

    def __iter__(self):
        for start in (0, 4):
            yield {"image": IMAGES[start : start + 4], "image2": IMAGES[start : start + 4]}


@pytest.mark.slow
@pytest.mark.parametrize("objective", [jt.simclr(NET, tap="features"), jt.moco(NET, queue=8, tap="features")])
def test_loaders_of_other_libraries(objective):
    run = fitted(Loader(), objective)
    assert [record["step"] for record in run.history] == [1, 2]
    assert np.isfinite(jt.evaluate(objective, run.state, Loader())["loss"])


def test_a_state_to_evaluate_needs_no_optimizer(state):
    bare = types.SimpleNamespace(step=0, params=state.params, state=state.state)
    assert jt.evaluate(OBJECTIVE, bare, [BATCH]) == jt.evaluate(OBJECTIVE, state, [BATCH])


def test_a_later_batch_without_rows(state):
    empty = {name: entry[:0] for name, entry in BATCH.items()}
    with pytest.raises(jt.InputError, match="needs a row or more"):
        fitted([BATCH, empty])
    with pytest.raises(jt.InputError, match="needs a row or more"):
        jt.evaluate(OBJECTIVE, state, [empty])


def test_a_seed_is_a_key_everywhere():
    by_seed, by_key = (jt.init(OBJECTIVE, SGD, key, BATCH) for key in (3, jax.random.key(3)))
    chex.assert_trees_all_equal(by_seed.params, by_key.params)
    assert by_seed.key == by_key.key == jt.init(OBJECTIVE, SGD, np.int64(3), BATCH).key


@pytest.mark.parametrize("key", ["0", None, 0.5, True, jax.random.split(jax.random.key(0), 3), 2**70])
def test_what_is_no_key(key):
    with pytest.raises(jt.InputError, match=r"key is a seed|a seed is a whole number"):
        jt.init(OBJECTIVE, SGD, key, BATCH)
    with pytest.raises(jt.InputError, match=r"key is a seed|a seed is a whole number"):
        fitted(key=key)


@pytest.mark.parametrize("thing", [nn.Dense, nn.Dense(3), "weights", [np.zeros(3), nn.Dense(3)]])
def test_a_module_is_no_array(state, thing):
    inner = {**state.params["model"], "head": thing}
    for call in (
        lambda: fitted(params={"model": inner}),
        lambda: jt.init(OBJECTIVE + jt.l2_sp({"model": inner}), SGD, 0, BATCH),
        lambda: jt.evaluate(OBJECTIVE, jt.TrainState.of({"model": inner}), [BATCH]),
        lambda: jt.frozen(NET, {"params": inner}),
    ):
        with pytest.raises(jt.InputError, match=r"expected arrays as leaves; .*head(/1)? is a (type|Dense|str)"):
            call()
    with pytest.raises(jt.InputError, match="params is a dict by model name"):
        fitted(params=thing)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"sample": lambda key: BATCH}, r"sample is a function of \(key, data\); the one given takes \(key\)"),
        ({"sample": 3}, r"sample is a function of \(key, data\); got int '3'"),
        ({"transform": lambda batch: batch}, r"transform is a function of \(key, batch, rows\); the one given takes"),
        ({"objective": NET}, "expected an objective, such as .*; got a Model"),
        ({"optimizer": None}, "expected an optax optimiser"),
    ],
)
def test_other_arguments(more, why):
    with pytest.raises(jt.InputError, match=why):
        fitted(**{"data": BATCH if "sample" in more else [BATCH], **more})


def test_a_state_that_lacks_what_is_evaluated(state):
    for objective in (jt.classification(jt.ema(NET)), jt.classification(NET.named("other")), jt.mean_teacher(NET)):
        with pytest.raises(
            jt.InputError, match=r"the objective runs '(model_ema|other)', of which the state has nothing"
        ):
            jt.evaluate(objective, state, [BATCH])
    with pytest.raises(jt.InputError, match="expected a state, such as"):
        jt.evaluate(OBJECTIVE, state.params, [BATCH])


def test_another_key_that_is_missing_is_no_model(state):
    def loss(outputs, params, state, batch, ctx):
        return params["model"]["head"]["bias"].sum() * batch["text"].sum(), state, {}

    with pytest.raises(KeyError, match="text"):
        jt.evaluate(jt.Objective("own", (), loss), state, [BATCH])


EPISODE = {"support": BATCH, "query": BATCH}
LEARNERS = {
    "maml": jt.maml(OBJECTIVE, inner=SGD, steps=1),
    "reptile": jt.meta.reptile(OBJECTIVE, inner=SGD, steps=1),
    "prototypical": jt.meta.prototypical(NET, ways=3),
}


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_an_episode_without_the_axis_of_tasks(state, name):
    for call in (
        lambda: jt.init(LEARNERS[name], SGD, 0, EPISODE),
        lambda: fitted([EPISODE, EPISODE], objective=LEARNERS[name]),
        lambda: jt.evaluate_episodes(LEARNERS[name], state, [EPISODE]),
    ):
        with pytest.raises(jt.InputError, match=r"\[tasks, examples, \.\.\.\]"):
            call()


def test_episodes_are_evaluated_in_batches_of_what_was_trained(state):
    whole = jax.tree.map(lambda x: x[None], EPISODE)
    assert set(jt.evaluate_episodes(LEARNERS["maml"], state, [whole])) >= {"accuracy"}
    other = jt.maml(jt.classification(NET.named("other")), inner=SGD, steps=1)
    for objective, weights, batches, why in (
        (LEARNERS["maml"], state, whole, "evaluate_episodes takes batches one after the other, got a dict"),
        (LEARNERS["maml"], state.params, [whole], "expected a state"),
        (NET, state, [whole], "expected an objective"),
        (other, state, [whole], "the objective runs 'other', of which the state has nothing; it has 'model'"),
    ):
        with pytest.raises(jt.InputError, match=why):
            jt.evaluate_episodes(objective, weights, batches)


def test_a_step_of_ones_own(state):
    step = jt.train_step(OBJECTIVE, SGD)
    with pytest.raises(jt.InputError, match="a batch is a dict of arrays"):
        step(state, (IMAGES, BATCH["label"]))
    with pytest.raises(jt.InputError, match="needs a row or more"):
        step(state, {name: entry[:0] for name, entry in BATCH.items()})
    with pytest.raises(jt.InputError, match=r"sample is a function of \(key, data\)"):
        jt.train_step(OBJECTIVE, SGD, sample=lambda key: BATCH)
    for call in (
        lambda: jt.fisher_diagonal(OBJECTIVE, state.params, state.state, BATCH),
        lambda: jt.representation.embed(NET, {"params": state.params["model"]}, DATASET),
    ):
        with pytest.raises(jt.InputError, match=r"takes batches one after the other, got a (dict|Dataset): "):
            call()


def test_what_belongs_elsewhere_is_told_where():
    with pytest.raises(jt.InputError, match=r"as augmentations do: they go to jt\.data\.pipeline\(.*augment="):
        fitted(transform=jt.data.augment.random_flip())
    with pytest.raises(jt.InputError, match=r"mixup without classes= drops the labels: mixup\(alpha, classes=10\)"):
        fitted(jt.data.pipeline(DATASET, 4, augment=jt.data.augment.mixup(1.0)))
    with pytest.raises(jt.InputError, match=r"'scores' of jt\.measures, which is for jt\.evaluate\(measures=\)"):
        fitted(measure=jt.measures.classification(NET))


def test_who_reads_what_a_batch_lacks():
    batch = {"features": IMAGES.reshape(8, 4).astype(np.float32), "label": BATCH["label"]}
    with pytest.raises(jt.InputError, match=r"the objective reads batch\['image'\].*; name .*: view='features'"):
        jt.init(OBJECTIVE, SGD, jax.random.key(0), batch)
    told = jt.classification(NET, view="features")
    state = jt.init(told, SGD, jax.random.key(0), batch)
    with pytest.raises(jt.InputError, match=r"the measure 'scores' reads batch\['image'\].*view='features'"):
        jt.evaluate(told, state, [batch], measures=jt.measures.classification(NET))
