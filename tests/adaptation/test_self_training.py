"""Self-training: each method against what its formula says, and the contract of all."""

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.contract import KEY, assert_same_on_any_devices, batches, normalised

A = jt.adaptation
METHODS = {
    "mcc": lambda model: A.mcc(model),
    "bnm": lambda model: A.bnm(model, output="logits"),
}
FAST = {"mcc"}
METHOD = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", METHOD)
def test_contract(name, mesh_of):
    ended = assert_same_on_any_devices(
        lambda model: jt.classification(model).on("source") + METHODS[name](model), mesh_of
    )
    assert any(path.split("/", 1)[-1] == name for path in ended)


def data(rng, source=8, target=4):
    return {"source": batches(rng, 1, source)[0], "target": batches(rng, 1, target)[0]}


@pytest.fixture
def given(rng):
    """A model, a batch whose target has a mask, and the model's logits on the target in training mode."""
    model, batch = normalised([]), data(rng, 8, 6)
    batch["target"]["mask"] = np.float32([1, 1, 0, 1, 1, 1])
    state = jt.init(A.mcc(model), optax.sgd(0.1), KEY, batch)
    variables = {"params": state.params["model"], **state.state["model"]}

    @jax.jit
    def logits(x):
        return model.apply(variables, x, train=True, key=None)[0]["logits"]

    return model, batch, state, logits


def value_of(objective, state, batch):
    run = jax.jit(lambda params, state, batch: objective(params, state, batch, jt.Context(key=KEY)))
    value, new, metrics = run(state.params, state.state, batch)
    return float(value), new, {name: float(one.value) for name, one in metrics.items()}


def test_mcc_and_bnm_are_their_losses_of_the_target_alone(given):
    model, batch, state, logits = given
    kept = logits(batch["target"]["image"])[batch["target"]["mask"] > 0]
    value, _, metrics = value_of(A.mcc(model, temperature=2.0), state, batch)
    np.testing.assert_allclose(value, jax.jit(lambda x: jt.losses.mcc(x, temperature=2.0))(kept), rtol=1e-5)
    assert metrics == {"mcc": pytest.approx(value)}
    value, _, metrics = value_of(A.bnm(model), state, batch)
    np.testing.assert_allclose(value, jax.jit(jt.losses.bnm)(kept), rtol=1e-5)
    assert metrics == {"bnm": pytest.approx(value)}


def test_bad_input_is_one_clear_error():
    model = normalised([])
    with pytest.raises(jt.InputError, match="temperature must be positive"):
        A.mcc(model, temperature=0)
    for objective in (A.mcc(model), A.bnm(model)):
        with pytest.raises(jt.InputError, match="target"):
            jt.init(objective, optax.sgd(0.1), KEY, {"image": np.zeros((4, 4, 4, 1), np.float32)})
