"""Frozen means frozen: layers whose parameters don't move run in inference mode, whatever freezes them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.models.batch_norm import BatchNorm
from jaxtransfer.runs.checkpoints import fill

KEY = jax.random.key(0)
HEAD = {"model/head/kernel", "model/head/bias"}


@pytest.fixture
def batches(rng):
    images = rng.normal(size=(3, 8, 4, 4, 1)).astype(np.float32) * 2 + 1
    return [{"image": x, "label": (np.arange(8) % 3).astype(np.int32)} for x in images]


class Small(nn.Module):
    """Three linear layers with batch norm, two of ours and one of Flax, and a head."""

    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        """Returns features and logits."""
        x = x.reshape(len(x), -1)
        for name in ("stem", "stage1"):
            x = nn.relu(BatchNorm(train, axis=self.axis, name=f"{name}_norm")(nn.Dense(5, name=f"{name}_dense")(x)))
        x = nn.Dense(5, name="stage2_dense")(x)
        x = nn.relu(nn.BatchNorm(not train, axis_name=self.axis, name="stage2_norm")(x))
        return {"features": x, "logits": nn.Dense(3, name="head")(x)}


def small(name="model"):
    return jt.models.linen(Small(), name=name, stages=("stem_.*", "stage1_.*", "stage2_.*", "head"))


def trained(objective, optimizer, batches, *, params=None, state=None, **place):
    """The start and the end of a short training, by path."""
    current = jt.init(objective, optimizer, KEY, batches[0], params=params, state=state)
    start = jax.tree.map(np.array, {"params": current.params, "state": current.state})
    step = jt.train_step(objective, optimizer, **place)
    for batch in batches:
        current, _ = step(current, batch)
    end = jax.tree.map(np.array, {"params": current.params, "state": current.state})
    return start, end


def moved(start, end, part):
    """The paths of what is not the same to the bit."""
    before, after = (jt.tree.leaves_by_path(jax.tree.map(np.asarray, values[part])) for values in (start, end))
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}


def head_on_features(model, start, batches, rate):
    """The head that gradient descent reaches on the features of inference, written out in NumPy."""
    variables = {"params": start["params"]["model"], **start["state"]["model"]}
    w, b = (start["params"]["model"]["head"][k].astype(np.float64) for k in ("kernel", "bias"))
    features = jax.jit(lambda images: model.apply(variables, images, train=False, key=None)[0]["features"])
    for batch in batches:
        x = np.asarray(features(batch["image"]), np.float64)
        logits = x @ w + b
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        error = (p - np.eye(3)[batch["label"]]) / len(x)
        w, b = w - rate * x.T @ error, b - rate * error.sum(0)
    return {"kernel": w, "bias": b}


WAYS = {
    "only": lambda opt, stages: jt.optim.only(opt, "head"),
    "freeze": lambda opt, stages: jt.optim.freeze(opt, stages[:-1]),
    "by_path": lambda opt, stages: jt.optim.by_path({"head": opt, ".*": optax.set_to_zero()}),
    "gradual": lambda opt, stages: jt.optim.gradual_unfreeze(opt, stages, every=100),
    "chained": lambda opt, stages: optax.chain(optax.identity(), jt.optim.only(opt, "head"), optax.scale(1.0)),
    "accumulated": lambda opt, stages: optax.MultiSteps(jt.optim.only(opt, "head"), 1),
    "gradual, accumulated": lambda opt, stages: optax.MultiSteps(jt.optim.gradual_unfreeze(opt, stages, every=100), 1),
    "injected": lambda opt, stages: optax.inject_hyperparams(lambda rate: jt.optim.only(optax.sgd(rate), "head"))(0.1),
}


SLOW = {"chained", "gradual", "injected", "gradual, accumulated"}


@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] * (w in SLOW)) for w in WAYS])
def test_a_frozen_body_is_that_of_inference(way, batches):
    model = small()
    optimizer = WAYS[way](optax.sgd(0.1), model.stages)
    start, end = trained(jt.classification(model), optimizer, batches)
    assert moved(start, end, "params") == HEAD
    assert moved(start, end, "state") == set()
    want = head_on_features(model, start, batches, 0.1)
    for name, values in want.items():
        np.testing.assert_allclose(end["params"]["model"]["head"][name], values, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["mesh", "pmap"])
@pytest.mark.parametrize("way", [pytest.param("only", marks=pytest.mark.slow), "gradual"])
def test_on_many_devices(way, mode, batches):
    model = small()
    place = {"mode": "pmap"} if mode == "pmap" else {"mesh": jax.make_mesh((4,), ("data",))}
    start, end = trained(jt.classification(model), WAYS[way](optax.sgd(0.1), model.stages), batches, **place)
    assert moved(start, end, "state") == set()
    want = head_on_features(model, start, batches, 0.1)
    np.testing.assert_allclose(end["params"]["model"]["head"]["kernel"], want["kernel"], rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_each_stage_is_frozen_until_its_step(batches):
    """One program; each phase is what the layers frozen by pattern give in a program of its own."""
    model, stages = small(), small().stages
    optimizer = jt.optim.gradual_unfreeze(optax.sgd(0.1), stages, every=1)
    objective, traces = jt.classification(model), []

    def counted(variables, inputs, **how):
        traces.append(how)
        return model.apply(variables, inputs, **how)

    watched = jt.classification(dataclasses.replace(model, apply=counted))
    state = jt.init(watched, optimizer, KEY, batches[0])
    step = jt.train_step(watched, optimizer)
    traces.clear()
    for number, batch in enumerate(batches):
        begin = jax.tree.map(np.array, {"params": state.params, "state": state.state})
        state, _ = step(state, batch)
        end = jax.tree.map(np.array, {"params": state.params, "state": state.state})
        free = jt.optim.only(optax.sgd(0.1), stages[-1 - number :])
        alone = jt.init(objective, free, KEY, batch, params=begin["params"], state=begin["state"])
        alone, _ = jt.train_step(objective, free)(alone, batch)
        for part, want in (("params", alone.params), ("state", alone.state)):
            got, want = jt.tree.leaves_by_path(end[part]), jt.tree.leaves_by_path(want)
            for path in want:
                np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-6, err_msg=f"{number} {path}")
        moving = {path.split("/")[2] for path in moved(begin, end, "state")}
        assert moving == set(("stage2_norm", "stage1_norm")[:number])
    assert len(traces) == 1


@pytest.mark.slow
def test_adapting_the_statistics_is_a_choice(batches):
    model = small()
    objective = jt.classification(model)
    labels = lambda params: jt.tree.label(params, {"head": "on", ".*": "off"})  # noqa: E731
    optax_alone = optax.multi_transform({"on": optax.sgd(0.1), "off": optax.set_to_zero()}, labels)
    _, want = trained(objective, optax_alone, batches)
    for make in (
        jt.optim.only(optax.sgd(0.1), "head", adapt_statistics=True),
        jt.optim.freeze(optax.sgd(0.1), model.stages[:-1], adapt_statistics=True),
        jt.optim.gradual_unfreeze(optax.sgd(0.1), model.stages, every=100, adapt_statistics=True),
    ):
        start, end = trained(objective, make, batches)
        assert moved(start, end, "params") == HEAD
        assert len(moved(start, end, "state")) == len(jax.tree.leaves(start["state"])) == 6
        assert moved(want, end, "state") == set()
    (stage,) = jt.methods.gradual(model, optax.sgd(0.1), every=100, adapt_statistics=True)
    assert len(moved(*trained(objective, stage.optimizer, batches), "state")) == 6


@pytest.mark.slow
def test_a_norm_is_frozen_with_its_own_parameters(batches):
    """Its scale alone, its bias alone or the linear layer before it don't freeze the statistics."""
    objective = jt.classification(small())
    half = jt.optim.freeze(optax.sgd(0.1), ("bias", ".*_dense"))
    assert len(moved(*trained(objective, half, batches), "state")) == 6
    start, end = trained(objective, jt.optim.freeze(optax.sgd(0.1), ".*_norm"), batches)
    assert moved(start, end, "state") == set()
    assert {path.split("/")[1].split("_")[-1] for path in moved(start, end, "params")} == {"dense", "head"}
    start, end = trained(objective, jt.optim.freeze(optax.sgd(0.1), "stem_.*"), batches)
    assert {path.split("/")[2] for path in moved(start, end, "state")} == {"stage1_norm", "stage2_norm"}


class Block(nn.Module):
    """Normalises in four ways, attends and drops."""

    train: bool = False
    axis: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.5, name="field")(x)
        x = nn.BatchNorm(momentum=0.5, name="argument")(x, use_running_average=not self.train)
        x = nn.BatchNorm(momentum=0.5, name="position")(x, not self.train)
        x = nn.BatchNorm(not self.train, use_scale=False, use_bias=False, momentum=0.5, name="plain")(x)
        y = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=not self.train, name="attention")(x)
        x = nn.Dropout(0.5)(x + y, deterministic=not self.train)
        return nn.Dropout(0.5, deterministic=not self.train)(x)


class Net(nn.Module):
    """Two blocks, one of them rematerialised, dropout, a head."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.reshape(len(x), 4, 4)
        x = Block(train, name="one")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.remat(Block)(train, name="two")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        features = x.mean(1)
        return {"features": features, "logits": nn.Dense(3, name="head")(features)}


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param("only", marks=pytest.mark.slow), "gradual"])
def test_a_module_of_your_own(way, batches):
    model = jt.models.linen(Net(), stages=("one", "two", "head"))
    optimizer = WAYS[way](optax.sgd(0.1), model.stages)
    start, end = trained(jt.classification(model), optimizer, batches)
    assert moved(start, end, "params") == HEAD
    assert moved(start, end, "state") == set()
    assert len(jax.tree.leaves(start["state"])) == 16
    want = head_on_features(model, start, batches, 0.1)
    np.testing.assert_allclose(end["params"]["model"]["head"]["kernel"], want["kernel"], rtol=2e-5, atol=1e-6)
    start, end = trained(jt.classification(model), jt.optim.freeze(optax.sgd(0.1), "one"), batches)
    assert {path.split("/")[2] for path in moved(start, end, "state")} == {"two"}
    assert len(moved(start, end, "state")) == 8


class Scanned(nn.Module):
    """Three layers with batch norm in a scan, and a head."""

    @nn.compact
    def __call__(self, x, *, train=False):
        def layer(module, x, _):
            x = nn.Dense(4, parent=module, name="dense")(x)
            return nn.relu(nn.BatchNorm(not train, momentum=0.5, parent=module, name="norm")(x)), None

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return layer(self, x, _)

        x = nn.Dense(4, name="stem")(x.reshape(len(x), -1))
        stacked = nn.scan(Layer, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
        features, _ = stacked(name="body")(x, None)
        return {"features": features, "logits": nn.Dense(3, name="head")(features)}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["only", "gradual"])
def test_layers_in_a_scan(way, batches):
    model = jt.models.linen(Scanned(), stages=("stem", "body", "head"))
    start, end = trained(jt.classification(model), WAYS[way](optax.sgd(0.1), model.stages), batches)
    assert moved(start, end, "state") == set()
    want = head_on_features(model, start, batches, 0.1)
    np.testing.assert_allclose(end["params"]["model"]["head"]["kernel"], want["kernel"], rtol=2e-5, atol=1e-6)


class OwnNorm(nn.Module):
    """Keeps a running mean, and knows its mode by a name of its own."""

    learns: bool

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        if self.learns and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return x - mean.value[None]


class WithOwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = OwnNorm(train, name="own")(nn.Dense(4, name="body")(x.reshape(len(x), -1)))
        return nn.Dense(3, name="head")(x)


def test_a_layer_that_can_not_be_told_is_refused(batches):
    objective = jt.classification(jt.models.linen(WithOwnNorm()))
    for optimizer in (
        jt.optim.only(optax.sgd(0.1), "head"),
        jt.optim.gradual_unfreeze(optax.sgd(0.1), ("body", "head"), every=2),
    ):
        with pytest.raises(jt.InputError, match=r"layer 'own' of model 'model' is frozen, but .* 'mean' moves"):
            jt.init(objective, optimizer, KEY, batches[0])
    start, end = trained(objective, jt.optim.only(optax.sgd(0.1), "head", adapt_statistics=True), batches)
    assert moved(start, end, "state") == {"model/batch_stats/own/mean"}
    start, end = trained(objective, jt.optim.freeze(optax.sgd(0.1), "head"), batches)
    assert moved(start, end, "state") == {"model/batch_stats/own/mean"}
    start, end = trained(
        jt.classification(jt.models.linen(WithOwnNorm()).inference()), jt.optim.only(optax.sgd(0.1), "head"), batches
    )
    assert moved(start, end, "state") == set()


class CenteredByCall(nn.Module):
    """Running means of your own; the mode is an argument of the call."""

    @nn.compact
    def __call__(self, x, train):
        """Returns `x` without its mean."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, (1, x.shape[1]))
        scale = self.param("scale", nn.initializers.ones_init(), (1, x.shape[1]))
        here = x.mean(0, keepdims=True) if train else mean.value
        if train and not self.is_initializing():
            mean.value = (mean.value + here) / 2
        return (x - here) * scale


class CenteredByField(nn.Module):
    """The same; the mode is a field."""

    training: bool

    @nn.compact
    def __call__(self, x):
        """Returns `x` without its mean."""
        return CenteredByCall(name="inside")(x, self.training)


class DropsByCall(nn.Module):
    """Dropout of your own, the mode an argument of the call."""

    @nn.compact
    def __call__(self, x, *, training):
        """Returns `x`, in training half of it."""
        return x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape) if training else x


class Fixed(nn.Module):
    """A layer with a constant, which no training moves."""

    @nn.compact
    def __call__(self, x):
        """Returns a random map of `x`."""
        return nn.Dense(5)(x * self.variable("constants", "signs", jnp.ones, (1, x.shape[1])).value)


TOLD = {
    "an argument": lambda x, train: CenteredByCall(name="told")(x, train),
    "an argument by name": lambda x, train: CenteredByCall(name="told")(x, train=train),
    "a field": lambda x, train: CenteredByField(train, name="told")(x),
    "spectral norm": lambda x, train: nn.SpectralNorm(nn.Dense(5, name="told"))(x, update_stats=train),
    "dropout": lambda x, train: DropsByCall()(x, training=train),
    "a constant that is computed anew": lambda x, train: nn.remat(Fixed)(name="told")(x),
}


class Told(nn.Module):
    """A body with one of these layers, and a head."""

    kind: str

    @nn.compact
    def __call__(self, x, *, train=False):
        """Returns features and logits."""
        x = TOLD[self.kind](nn.Dense(5, name="stem")(x.reshape(len(x), -1)), train)
        return {"features": x, "logits": nn.Dense(3, name="head")(x)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOLD)
def test_layers_that_say_their_mode_otherwise(kind, batches):
    model = jt.models.linen(Told(kind))
    start, end = trained(jt.classification(model), jt.optim.only(optax.sgd(0.3), "head"), batches)
    assert not moved(start, end, "state")
    assert moved(start, end, "params") == HEAD
    right = head_on_features(model, start, batches, 0.3)
    np.testing.assert_allclose(end["params"]["model"]["head"]["kernel"], right["kernel"], rtol=1e-5, atol=1e-6)


def test_a_head_under_spectral_norm_trains_with_its_estimate(batches):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            x = nn.Dense(5, name="stem")(x.reshape(len(x), -1))
            return nn.SpectralNorm(nn.Dense(3, name="head"))(x, update_stats=train)

    model = jt.models.linen(Net())
    start, end = trained(jt.classification(model), jt.optim.only(optax.sgd(0.3), "head"), batches)
    assert len(moved(start, end, "state")) == 2  # the singular vector and value


def foreign(name="other"):
    """A pair of functions with a running mean, whose layers can't be told apart."""

    def init(key, x):
        return {"params": {"body": jnp.ones(16), "head": jnp.ones((16, 3))}, "stats": {"mean": jnp.zeros(16)}}

    def apply(variables, x, *, train, key):
        x, mean = x.reshape(len(x), -1) * variables["params"]["body"][None], variables["stats"]["mean"]
        mean = 0.9 * mean + 0.1 * jax.lax.stop_gradient(x).mean(0) if train else mean
        return {"logits": (x - mean[None]) @ variables["params"]["head"]}, {"stats": {"mean": mean}}

    return jt.Model(init, apply, name)


@pytest.mark.slow
def test_a_foreign_pair_is_frozen_whole_or_refused(batches):
    objective = jt.classification(foreign())
    for optimizer in (
        jt.optim.only(optax.sgd(0.1), "head"),
        jt.optim.gradual_unfreeze(optax.sgd(0.1), ("body", "head"), every=2),
    ):
        with pytest.raises(jt.InputError, match=r"model 'other' is frozen.*running state \(stats\).*inference\(\)"):
            jt.init(objective, optimizer, KEY, batches[0])
    start, end = trained(jt.classification(foreign().inference()), jt.optim.only(optax.sgd(0.1), "head"), batches)
    assert moved(start, end, "state") == set()
    assert moved(start, end, "params") == {"other/head"}
    start, end = trained(objective, jt.optim.only(optax.sgd(0.1), "head", adapt_statistics=True), batches)
    assert moved(start, end, "state") == {"other/stats/mean"}
    both = objective + jt.classification(small()).named("second")
    start, end = trained(both, jt.optim.only(optax.sgd(0.1), "model"), batches)
    assert len(moved(start, end, "state")) == 6
    assert {path.split("/")[0] for path in moved(start, end, "state") | moved(start, end, "params")} == {"model"}
    with pytest.raises(jt.InputError, match=r"mask: the pattern 'neck' selects no parameter"):
        foreign().inference(stages="neck").apply(foreign().init(KEY, None), jnp.ones((1, 16)), train=True, key=None)


def test_inference_of_some_stages(batches):
    model = small()
    start, end = trained(jt.classification(model.inference(stages=("stem_.*", "stage1_.*"))), optax.sgd(0.1), batches)
    assert {path.split("/")[2] for path in moved(start, end, "state")} == {"stage2_norm"}
    both = jt.optim.freeze(optax.sgd(0.1), "stage2_.*")
    start, end = trained(jt.classification(model.inference(stages=("stem_.*", "stage1_.*"))), both, batches)
    assert moved(start, end, "state") == set()


@pytest.mark.slow
def test_through_wrappers(batches):
    """Normalised images, micro-batches, heads: the frozen encoder keeps its statistics, the projection's move."""
    encoder = jt.models.normalize(small(), 1.0, 2.0)
    net = jt.micro_batched(jt.models.with_heads(encoder, projection=jt.models.head(4, 3)), 4)
    for optimizer in (jt.optim.freeze(optax.sgd(0.1), "encoder"), jt.optim.only(optax.sgd(0.1), net.head)):
        start, end = trained(jt.classification(net), optimizer, batches[:1])
        assert {path.split("/")[2] for path in moved(start, end, "state")} == {"projection"}
        assert len(jax.tree.leaves(start["state"])) == 8


def test_an_average_of_a_frozen_body(batches):
    model = small()
    objective = jt.classification(model) + jt.mean_teacher(model)
    start, end = trained(objective, jt.optim.only(optax.sgd(0.1), "head"), batches)
    assert moved(start, end, "params") == HEAD
    of_average = {path.split("/", 1)[1] for path in moved(start, end, "state")} - {"count"}
    assert of_average == {"params/head/kernel", "params/head/bias"}


@pytest.mark.slow
def test_everything_frozen_or_nothing(batches):
    objective, rate = jt.classification(small()), optax.sgd(0.1)
    start, end = trained(objective, jt.optim.freeze(rate, ".*"), batches)
    assert moved(start, end, "state") | moved(start, end, "params") == set()
    start, end = trained(objective, jt.optim.only(rate, ".*"), batches)
    assert len(moved(start, end, "state")) == 6
    assert moved(start, end, "params") == set(jt.tree.leaves_by_path(start["params"]))


@pytest.mark.slow
def test_inside_tasks_the_statistics_are_as_they_say(rng):
    """A few-shot learner says itself what normalises, in training as in evaluation."""
    maml = jt.maml(jt.classification(small()), inner=optax.sgd(0.1), steps=1)
    images, labels = rng.normal(size=(2, 2, 6, 4, 4, 1)).astype(np.float32) * 2 + 1, np.tile(np.arange(6) % 3, (2, 1))
    batch = {"support": {"image": images[0], "label": labels}, "query": {"image": images[1], "label": labels}}
    losses = []
    for optimizer in (optax.sgd(0.1), jt.optim.only(optax.sgd(0.1), "head")):
        state = jt.init(maml, optimizer, KEY, batch)
        losses.append(float(jt.train_step(maml, optimizer)(state, batch)[1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_convolutional_net_of_the_zoo(batches):
    model = jt.models.small_cnn(3, width=2)
    start, end = trained(jt.classification(model), jt.optim.only(optax.sgd(0.1), "head"), batches)
    assert moved(start, end, "state") == set()
    want = head_on_features(model, start, batches, 0.1)
    np.testing.assert_allclose(end["params"]["model"]["head"]["kernel"], want["kernel"], rtol=2e-5, atol=1e-6)


def test_a_restored_state_is_as_frozen(batches):
    """What is frozen is no part of a checkpoint: the optimiser says it again, and goes on counting."""
    model = small()
    objective, optimizer = jt.classification(model), jt.optim.gradual_unfreeze(optax.sgd(0.1), model.stages, every=2)
    step, state = jt.train_step(objective, optimizer), jt.init(objective, optimizer, KEY, batches[0])
    state, _ = step(state, batches[0])
    saved = {path: np.asarray(leaf) for path, leaf in jt.tree.leaves_by_path(state._replace(key=())).items()}
    fresh = jt.init(objective, optimizer, KEY, batches[0])
    again = fill(fresh._replace(key=()), saved)
    again = jt.TrainState(*again)._replace(key=jnp.copy(state.key))
    for batch in batches[1:]:
        (state, _), (again, _) = step(state, batch), step(again, batch)
    for got, want in ((again.params, state.params), (again.state, state.state)):
        assert moved({"all": want}, {"all": got}, "all") == set()
    assert {path.split("/")[2] for path in moved({"s": fresh.state}, {"s": state.state}, "s")} == {"stage2_norm"}
