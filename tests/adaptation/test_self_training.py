"""Self-training: each method against what its formula says, and the contract of all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.contract import KEY, assert_same_on_any_devices, batches, normalised

A = jt.adaptation
METHODS = {
    "mcc": lambda model: A.mcc(model),
    "bnm": lambda model: A.bnm(model),
    "pseudo_label": lambda model: A.pseudo_label(model, threshold=0.3),
    "fixmatch": lambda model: A.fixmatch(model, threshold=0.35),
    "flexmatch": lambda model: A.flexmatch(model, examples=8, threshold=0.35),
    "uda": lambda model: A.uda(model, threshold=0.3),
    "vat": lambda model: A.vat(model, radius=0.5),
    "pseudo_label of a twin": lambda model: A.pseudo_label(model.twin("inside", own="scale"), threshold=0.3),
    "fixmatch of an average": lambda model: A.fixmatch(model, teacher=jt.ema(model, 0.9), threshold=0.3),
}
FAST = {"flexmatch"}
METHOD = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]
ANNEALED = jt.schedules.linear_ramp(0.25, 1.0, 5)


@pytest.mark.parametrize("name", METHOD)
def test_contract(name, mesh_of):
    source = A.signal_annealing if name == "uda" else lambda model, _: jt.classification(model)
    ended = assert_same_on_any_devices(
        lambda model: source(model, ANNEALED).on("source") + METHODS[name](model), mesh_of
    )
    assert any(path.split("/", 1)[-1] == name.split()[0] for path in ended)


@pytest.fixture
def given(rng):
    """A model, a batch whose target has a mask, its state, and its logits in training mode on each view."""
    model = normalised([])
    batch = {"source": batches(rng, 1, 8)[0], "target": batches(rng, 1, 6)[0]}
    batch["target"]["mask"] = np.float32([1, 1, 0, 1, 1, 1])
    state = jt.init(jt.classification(model).on("source"), optax.sgd(0.1), KEY, batch)
    state.params["model"]["head"]["kernel"] *= 2  # so that some guesses are sure
    variables = {"params": state.params["model"], **state.state["model"]}

    @jax.jit
    def logits(x):
        return model.apply(variables, x, train=True, key=None)[0]["logits"]

    found = {view: np.float64(logits(batch["target"][view])) for view in ("image", "image2")}
    found["source"] = np.float64(logits(batch["source"]["image"]))
    return model, batch, state, found


def value_of(objective, state, batch, **how):
    """The value of an objective, the state after it, its metrics and its gradient."""
    own = {**objective.init(KEY, batch)[1], **state.state}

    @jax.jit
    def run(params, own, batch, step):
        def total(params):
            value, new, metrics = objective(params, own, batch, jt.Context(step=step, key=KEY, **how))
            return value, (new, metrics)

        return jax.value_and_grad(total, has_aux=True)(params)

    (value, (new, metrics)), slope = run(state.params, own, batch, jnp.int32(2))
    return float(value), new, {name: float(one.value) for name, one in metrics.items()}, slope


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def taught(weak, strong, limit, mask):
    """The mean over the kept of what a sure guess teaches, by a loop, and the share of sure ones."""
    total = kept = 0.0
    for w, s, own in zip(softmax(weak), softmax(strong), mask, strict=True):
        sure = float(w.max() >= limit[w.argmax()])
        total -= own * sure * np.log(s[w.argmax()])
        kept += own * sure
    return total / mask.sum(), kept / mask.sum()


def test_mcc_and_bnm_are_their_losses_of_the_target_alone(given):
    model, batch, state, found = given
    kept = jnp.float32(found["image"][batch["target"]["mask"] > 0])
    value, _, metrics, _ = value_of(A.mcc(model, temperature=2.0), state, batch)
    np.testing.assert_allclose(value, jax.jit(lambda x: jt.losses.mcc(x, temperature=2.0))(kept), rtol=1e-5)
    assert metrics == {"mcc": pytest.approx(value)}
    value, _, metrics, _ = value_of(A.bnm(model), state, batch)
    np.testing.assert_allclose(value, jax.jit(jt.losses.bnm)(kept), rtol=1e-5)
    assert metrics == {"bnm": pytest.approx(value)}


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_pseudo_label_teaches_a_view_what_it_says_itself(given, threshold):
    model, batch, state, found = given
    value, _, metrics, _ = value_of(A.pseudo_label(model, threshold=threshold), state, batch)
    mask = batch["target"]["mask"]
    expected, share = taught(found["image"], found["image"], [threshold] * 4, mask)
    np.testing.assert_allclose([value, metrics["pseudo_label/kept"]], [expected, share], rtol=1e-5)
    assert 0 < share < 1 or not threshold


def test_fixmatch_teaches_the_strong_view(given):
    model, batch, state, found = given
    value, _, metrics, slope = value_of(A.fixmatch(model, threshold=0.6), state, batch)
    mask = batch["target"]["mask"]
    expected, share = taught(found["image"], found["image2"], [0.6] * 4, mask)
    np.testing.assert_allclose([value, metrics["fixmatch/kept"]], [expected, share], rtol=1e-5)
    other = batch | {"target": batch["target"] | {"weak": batch["target"]["image"], "image": None}}
    del other["target"]["image"]
    again = value_of(A.fixmatch(model, threshold=0.6, view="weak"), state, other)
    np.testing.assert_allclose(again[0], value, rtol=1e-6)
    # the bias of the head moves by the strong view alone
    weak, strong = softmax(found["image"]), softmax(found["image2"])
    sure = (weak.max(1) >= 0.6) * mask / mask.sum()
    expected = (sure[:, None] * (strong - np.eye(4)[weak.argmax(1)])).sum(0)
    np.testing.assert_allclose(slope["model"]["head"]["bias"], expected, rtol=1e-4, atol=1e-6)


def test_what_nobody_is_sure_of_teaches_nothing(given):
    model, batch, state, _ = given
    for objective in (
        A.fixmatch(model, threshold=1.0),
        A.pseudo_label(model, threshold=1.0),
        A.uda(model, threshold=1.0),
    ):
        value, _, _, slope = value_of(objective, state, batch)
        assert value == 0
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(slope))
    empty = batch | {"target": batch["target"] | {"mask": np.zeros(6, np.float32)}}
    value, _, metrics, slope = value_of(A.fixmatch(model, threshold=0.0), state, empty)
    assert value == metrics["fixmatch/kept"] == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_uda_sharpens_the_weak_view(given):
    model, batch, state, found = given
    objective = A.uda(model, temperature=0.5, threshold=0.6)
    value, _, metrics, slope = value_of(objective, state, batch)
    mask, total, kept = batch["target"]["mask"], 0.0, 0.0
    weak, sharp, strong = softmax(found["image"]), softmax(found["image"] / 0.5), softmax(found["image2"])
    for w, p, q, own in zip(weak, sharp, strong, mask, strict=True):
        sure = own * (w.max() > 0.6)
        total, kept = total + sure * np.sum(p * np.log(p / q)), kept + sure
    np.testing.assert_allclose([value, metrics["uda/kept"]], [total / mask.sum(), kept / mask.sum()], rtol=1e-5)
    sure = (weak.max(1) > 0.6) * mask / mask.sum()
    expected = (sure[:, None] * (strong - sharp)).sum(0)
    np.testing.assert_allclose(slope["model"]["head"]["bias"], expected, rtol=1e-4, atol=1e-6)


def test_signal_annealing_leaves_out_what_is_learned(given):
    model, batch, state, found = given
    batch["source"]["mask"] = np.float32([1, 0, 1, 1, 1, 1, 1, 1])
    mask, label = batch["source"]["mask"], batch["source"]["label"]
    own = softmax(found["source"])[np.arange(8), label]
    for threshold, limit in ((0.5, 0.5), (ANNEALED, 0.25 + 0.75 * 2 / 5), (0.0, 0.0)):
        value, _, metrics, _ = value_of(A.signal_annealing(model, threshold).on("source"), state, batch)
        keep = mask * (own <= limit)
        np.testing.assert_allclose(value, np.sum(-np.log(own) * keep) / max(keep.sum(), 1), rtol=1e-5)
        np.testing.assert_allclose(metrics["source/signal_annealing/kept"], keep.sum() / mask.sum(), rtol=1e-6)
    right = (found["source"].argmax(1) == label) * mask
    np.testing.assert_allclose(metrics["source/accuracy"], right.sum() / mask.sum(), rtol=1e-6)


def test_fixmatch_asks_another_teacher(given):
    model, batch, state, found = given
    teacher = normalised([]).named("teacher")
    variables = teacher.init(jax.random.key(8), batch["target"]["image"])
    frozen = jt.frozen(teacher, variables)
    logits = jax.jit(lambda x: teacher.apply(variables, x, train=False, key=None)[0]["logits"])
    value, _, metrics, slope = value_of(A.fixmatch(model, teacher=frozen, threshold=0.3), state, batch)
    expected, share = taught(
        np.float64(logits(batch["target"]["image"])), found["image2"], [0.3] * 4, batch["target"]["mask"]
    )
    np.testing.assert_allclose([value, metrics["fixmatch/kept"]], [expected, share], rtol=1e-5)
    assert slope.keys() == {"model"}


@pytest.mark.slow
def test_vat_is_its_loss_of_the_model_in_training_mode(given):
    """The noise is of each row's own key, and the runs on moved inputs leave the statistics alone."""
    model, batch, state, _ = given
    objective = A.vat(model, radius=0.7, iterations=2)
    value, new, metrics, slope = value_of(objective, state, batch)
    key = jt.Context(step=2, key=KEY).shared_key("model_target_vat")
    images, stats = batch["target"]["image"], state.state["model"]

    def expected(params):
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(6))
        noise = jax.vmap(lambda own: jax.random.normal(own, images.shape[1:]))(keys)

        def forward(x):
            return model.apply({"params": params, **stats}, x, train=True, key=None)[0]["logits"]

        mask = batch["target"]["mask"]
        values = jt.losses.vat(jnp.asarray(images), noise, forward=forward, radius=0.7, iterations=2, mask=mask)
        return jnp.sum(values) / jnp.sum(mask)

    loss, slopes = jax.jit(jax.value_and_grad(expected))(state.params["model"])
    np.testing.assert_allclose([value, metrics["vat"]], [loss, loss], rtol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, (slope["model"], slopes)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    once = value_of(A.mcc(model), state, batch)[1]
    for a, b in zip(*map(jax.tree.leaves, (new["model"], once["model"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    bytes_ = batch | {"target": batch["target"] | {"image": np.uint8(40 * np.abs(images))}}
    floats = batch | {"target": batch["target"] | {"image": np.float32(bytes_["target"]["image"]) / 255}}
    some, others = (value_of(objective, state, one, train=False)[0] for one in (bytes_, floats))
    np.testing.assert_allclose(some, others, rtol=1e-4)


@pytest.mark.parametrize("warm_up", [True, False])
def test_flexmatch_has_a_threshold_for_each_class(given, warm_up):
    """Counts are those of the memory before the batch; what is above the fixed threshold enters it."""
    model, batch, state, found = given
    memory = np.int32([0, 1, 1, -1, 0, -1, 2, 0, 0, -1, -1, -1])
    batch["target"]["index"] = np.int32([3, 5, 6, 0, 9, 10])
    objective = A.flexmatch(model, examples=12, threshold=0.6, warm_up=warm_up)
    name = "model_target_flexmatch"
    np.testing.assert_array_equal(objective.init(KEY, batch)[1][name]["label"], np.full(12, -1))
    held = state._replace(state={**state.state, name: {"label": jnp.asarray(memory)}})
    value, new, metrics, _ = value_of(objective, held, batch)
    learned = np.array([4, 2, 1, 0]) / (5 if warm_up else 4)
    mask = batch["target"]["mask"]
    expected, share = taught(found["image"], found["image2"], 0.6 * learned / (2 - learned), mask)
    np.testing.assert_allclose([value, metrics["flexmatch/kept"]], [expected, share], rtol=1e-5)
    np.testing.assert_allclose(metrics["flexmatch/labelled"], 7 / 12, rtol=1e-6)
    weak = softmax(found["image"])
    for place, own, w in zip(batch["target"]["index"], mask, weak, strict=True):
        if own and w.max() >= 0.6:
            memory[place] = w.argmax()
    np.testing.assert_array_equal(new[name]["label"], memory)
    _, still, _, _ = value_of(objective, held, batch, train=False)
    np.testing.assert_array_equal(still[name]["label"], held.state[name]["label"])
    batch["target"]["index"] = np.where(mask > 0, batch["target"]["index"], 12)  # padding has no number
    assert value_of(objective, held, batch)[0] == pytest.approx(value)
    batch["target"]["index"] = batch["target"]["index"] + np.int32(3)
    assert np.isnan(value_of(objective, held, batch)[0])  # rather than a memory that misses examples


@pytest.mark.slow
def test_flexmatch_goes_on_to_the_same_bits(rng, tmp_path):
    parts = [{"source": batches(rng, 1, 8)[0], "target": batches(rng, 1, 4)[0]} for _ in range(6)]
    for number, part in enumerate(parts):
        part["target"]["index"] = np.int32(np.arange(4) + 4 * (number % 2))
    model = normalised([])
    objective = jt.classification(model).on("source") + A.flexmatch(model, examples=8, threshold=0.3)

    class Stopped(Exception):
        pass

    def fit(out=None, stop=None):
        def log(record):
            if stop is not None and record["step"] >= stop:
                raise Stopped

        how = {"save_every": 2, "log_every": 1, "steps": 6, "progress": False, "log": log}
        return jt.fit(objective, optax.sgd(0.3), parts, out=out, **how).state

    whole = fit()
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop=3)
    again = fit(tmp_path / "run")
    assert np.any(whole.state["model_target_flexmatch"]["label"] >= 0)
    for a, b in zip(*(jax.tree.leaves((one.params, one.state)) for one in (whole, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_input_is_one_clear_error(given):
    model, batch, _, _ = given

    def refused(make, match, batch=batch):
        with pytest.raises(jt.InputError, match=match):
            jt.init(make(), optax.sgd(0.1), KEY, batch)

    refused(lambda: A.mcc(model, temperature=0), "temperature must be positive")
    refused(lambda: A.uda(model, temperature=-1), "temperature must be positive")
    for method in (A.pseudo_label, A.fixmatch, A.uda):
        refused(lambda method=method: method(model, threshold=1.5), r"threshold must be in \[0, 1\]")
        refused(lambda method=method: method(model, output="features2"), "unknown output")
    refused(lambda: A.vat(model, radius=-1), "radius")
    refused(lambda: A.vat(model, iterations=0), "an iteration")
    refused(lambda: A.vat(model, xi=0), "xi must be positive")
    refused(lambda: A.vat(model, view="label"), "moves its inputs")
    refused(lambda: A.flexmatch(model, examples=0), "examples must be at least 1")
    refused(lambda: A.flexmatch(model, examples=3), r"index must be in \[0, 3\)")
    refused(lambda: A.fixmatch(model, strong="image3"), "image3")
    refused(lambda: A.signal_annealing(model, 2.0), "a probability or a schedule")
    unnumbered = batch | {"target": {k: v for k, v in batch["target"].items() if k != "index"}}
    refused(lambda: A.flexmatch(model, examples=9), "number of each example", unnumbered)
    flat = {"image": np.zeros((4, 4, 4, 1), np.float32)}
    for method in (A.mcc, A.bnm, A.fixmatch, A.pseudo_label):
        refused(lambda method=method: method(model), "target", flat)
