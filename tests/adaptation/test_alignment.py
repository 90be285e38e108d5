"""Methods that align features: the same on any devices, and against their losses on features computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.contract import KEY, assert_same_on_any_devices, batches, normalised

A = jt.adaptation


def beside(term):
    """The source's labels, and a term."""
    return lambda model: jt.classification(model).on("source") + term(model)


def of_branches(model, **options):
    return A.mfsan(A.branched(model, ("a", "b"), 4, dim=5), ("a", "b"), **options)


OBJECTIVES = {
    "dan": beside(lambda model: A.dan(model)),
    "dan of several layers": beside(lambda model: A.dan(model, tap=("features", "logits"), alphas=(0.5, 1.0))),
    "dan, one run": lambda model: jt.together(beside(A.dan)(model)),
    "jan": beside(A.jan),
    "jan, kernels alike": beside(lambda model: A.jan(model, sigma=None, alphas=(1.0,))),
    "deep_coral": beside(lambda model: 10 * A.deep_coral(model)),
    "deep_coral as released": beside(lambda model: A.deep_coral(model, released=True, tap=("logits", "features"))),
    "afn": beside(lambda model: 0.05 * A.afn(model, delta=0.3)),
    "swd": lambda model: A.swd(model, optax.sgd(0.05, momentum=0.9), directions=5, repeat=2, trade_off=3.0),
}
OF_SEVERAL_SOURCES = {
    "m3sda": lambda model: sum(jt.classification(model).on(name) for name in "ab") + 0.3 * A.m3sda(model, ("a", "b")),
    "mfsan": lambda model: A.mfsan(
        A.branched(model, ("a", "b"), 4, dim=5), ("a", "b"), coefficient=lambda step: 0.1 * step
    ),
    "mfsan, one run": lambda model: jt.together(A.mfsan(A.branched(model, ("a", "b"), 4, dim=5), ("a", "b"))),
}
FAST = {"deep_coral", "m3sda"}


def rows_of(objectives):
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in objectives]


@pytest.mark.slow
@pytest.mark.parametrize("name", rows_of(OBJECTIVES))
def test_the_same_on_any_devices(name, mesh_of):
    assert_same_on_any_devices(OBJECTIVES[name], mesh_of)


@pytest.mark.slow
@pytest.mark.parametrize("name", rows_of(OF_SEVERAL_SOURCES))
def test_several_sources_are_the_same_on_any_devices(name, mesh_of):
    assert_same_on_any_devices(OF_SEVERAL_SOURCES[name], mesh_of, rows=(16, 4, 8), domains=("a", "b", "target"))


@pytest.mark.slow
def test_linear_time_on_any_devices(mesh_of):
    assert_same_on_any_devices(beside(lambda model: A.dan(model, linear=True)), mesh_of, rows=(8, 8))


def given(rng, masked=True):
    """A batch of two sources and a target of unequal sizes, with far off values where it is masked."""
    parts = {}
    for name, rows in (("source", 8), ("b", 6), ("target", 4)):
        (batch,) = batches(rng, 1, rows)
        if masked:
            batch["mask"] = np.float32(np.arange(rows) != 1)
            batch["image"][1] = 100
        parts[name] = batch
    return parts


def plain():
    """Without batch norm, in which examples meet."""

    def init(key, inputs):
        keys = jax.random.split(key)
        return {"params": {"body": jax.random.normal(keys[0], (16, 5)), "head": jax.random.normal(keys[1], (5, 4))}}

    def apply(variables, inputs, *, train, key):
        features = jnp.tanh(inputs.reshape(len(inputs), -1) @ variables["params"]["body"])
        return {"features": features, "logits": features @ variables["params"]["head"], "flat": features[:, 0]}, {}

    return jt.Model(init, apply)


@pytest.mark.slow
def test_values_are_those_of_the_losses_on_the_rows_that_count(rng):
    model, batch = plain(), given(rng)
    terms = {
        "dan": (A.dan(model, tap=("features", "logits")), ("source", "target")),
        "jan": (A.jan(model), ("source", "target")),
        "deep_coral": (A.deep_coral(model), ("source", "target")),
        "afn": (A.afn(model, delta=0.3), ("source", "target")),
        "m3sda": (A.m3sda(model, ("source", "b")), ("source", "b", "target")),
    }
    total = sum(term for term, _ in terms.values())
    params, state = total.init(KEY, batch)

    @jax.jit
    def run(params):
        def loss(params):
            return total(params, state, batch, jt.Context(0, KEY))[::2]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, metrics), slopes = run(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))
    seen = {}
    for name, part in batch.items():
        kept = part["image"][part["mask"] > 0]
        seen[name], _ = model.apply({"params": params["model"]}, kept, train=False, key=None)

    @jax.jit
    def expected(s, b, t):
        five = (0.125, 0.25, 0.5, 1.0, 2.0)
        probabilities = [jax.nn.softmax(x["logits"]) for x in (s, t)]
        layers = [(x["features"], p) for x, p in zip((s, t), probabilities, strict=True)]
        return {
            "dan": sum(jt.losses.mmd(s[tap], t[tap], alphas=five) for tap in ("features", "logits")),
            "jan": jt.losses.jmmd(*layers, alphas=(five, (1.0,)), sigmas=(None, 0.92)),
            "deep_coral": jt.losses.coral(s["features"], t["features"]),
            "afn": 2 * jnp.float32(0.3) ** 2,
            "m3sda": jt.losses.moment_distance([s["features"], b["features"]], t["features"]),
            "afn/target_norm": jnp.mean(jnp.linalg.norm(t["features"], axis=1)),
        }

    for name, value in expected(*(seen[name] for name in ("source", "b", "target"))).items():
        np.testing.assert_allclose(metrics[name].value, value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_swd_weighs_the_distance_in_the_turn_of_the_encoder(rng):
    model, batch = dataclasses.replace(plain(), stages=("body", "head")), given(rng)
    objective, optimizer = A.swd(model, optax.sgd(0.1), directions=3, trade_off=50.0)
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    assert sorted(state.params) == ["model", "model_swd"]
    _, metrics = step(state, batch)
    seen = {name: float(mean) for name, mean in metrics.items()}
    assert {"fit/swd", "apart/discrepancy", "near/swd", "near/accuracy2"} <= seen.keys()
    np.testing.assert_allclose(seen["near/swd"], 50 * seen["near/discrepancy"], rtol=1e-5)


@pytest.mark.slow
def test_branches_predict_by_their_mean_and_each_learns_from_its_source(rng):
    model, batch = A.branched(plain(), ("source", "b"), 4, dim=6, batch_norm=False), given(rng)
    objective = A.mfsan(model, ("source", "b"), coefficient=0.5)
    params, state = objective.init(KEY, batch)

    @jax.jit
    def run(params):
        def loss(params):
            return objective(params, state, batch, jt.Context(0, KEY))[::2]

        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.jit
    def expected(params, batch):
        rows = {}
        for name, image in batch.items():
            rows[name], _ = model.apply({"params": params["model"]}, image, train=True, key=None)
        errors, gaps = [], []
        for name in ("source", "b"):
            errors.append(jnp.mean(jt.losses.cross_entropy(rows[name][f"{name}/logits"], labels[name])))
            features = (rows[domain][f"{name}/features"] for domain in (name, "target"))
            gaps.append(jt.losses.mmd(*features, alphas=(0.125, 0.25, 0.5, 1.0, 2.0)))
        both = [jax.nn.softmax(rows["target"][f"{name}/logits"]) for name in ("source", "b")]
        return sum(errors) / 2, sum(gaps) / 2, both, jnp.exp(rows["target"]["logits"])

    (value, metrics), slopes = run(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))
    labels = {name: part["label"][part["mask"] > 0] for name, part in batch.items()}
    error, gap, both, mean = expected(params, {name: part["image"][part["mask"] > 0] for name, part in batch.items()})
    apart = np.mean(np.abs(np.subtract(*both)))
    np.testing.assert_allclose(mean, np.mean(both, axis=0), rtol=1e-5)
    np.testing.assert_allclose(metrics["mfsan/mmd"].value, gap, rtol=1e-5)
    np.testing.assert_allclose(metrics["mfsan/disagreement"].value, apart, rtol=1e-5)
    np.testing.assert_allclose(value, error + 0.5 * (gap + apart), rtol=1e-5)


def test_what_a_method_cannot_take_is_one_clear_line(rng):
    model, batch = plain(), given(rng, masked=False)

    def begin(objective, batch=batch):
        jt.init(objective, optax.sgd(0.1), KEY, batch)

    with pytest.raises(jt.InputError, match="target"):
        begin(A.dan(model), {"source": batch["source"]})
    with pytest.raises(jt.InputError, match="pairs the examples up"):
        begin(A.dan(model, linear=True))
    with pytest.raises(jt.InputError, match="'nothing'"):
        begin(A.jan(model, tap="nothing"))
    with pytest.raises(jt.InputError, match="output 'flat' has shape"):
        begin(A.deep_coral(model, tap="flat"))
    alone = {**batch, "target": {name: column[:1] for name, column in batch["target"].items()}}
    with pytest.raises(jt.InputError, match="the batch of 'target' has 1 example"):
        begin(A.deep_coral(model), alone)
    for make in (A.dan, A.afn):
        with pytest.raises(jt.InputError, match="different entries of the batch"):
            make(model, source="target")
    with pytest.raises(jt.InputError, match="delta must be finite"):
        A.afn(model, delta=-1.0)
    with pytest.raises(jt.InputError, match="names of one source or more"):
        A.m3sda(model, "source")
    for sources in ("b", (), ("b", "b"), ("b", "target")):
        with pytest.raises(jt.InputError, match="each another entry of the batch"):
            A.mfsan(model, sources)
    with pytest.raises(jt.InputError, match="gives no 'b/features'; make it by"):
        begin(A.mfsan(model, ("b",)))
    with pytest.raises(jt.InputError, match="each another and none 'encoder'"):
        A.branched(model, ("encoder",), 4)
    with pytest.raises(jt.InputError, match="one direction or more; got 0"):
        A.swd(model, optax.sgd(0.1), directions=0)
    with pytest.raises(jt.InputError, match="sigma must be positive"):
        A.jan(model, sigma=0.0)


def test_a_term_shares_the_run_of_the_source():
    model = normalised([])
    objective = jt.classification(model).on("source") + A.dan(model) + A.jan(model) + A.afn(model)
    assert len(objective.forwards) == 2
