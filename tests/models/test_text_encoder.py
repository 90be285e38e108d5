"""Text encoders against loops of NumPy in float64, and what they do at the edges."""

import functools

import bert_reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

SIZES = {"width": 8, "depth": 2, "heads": 2, "hidden": 12, "vocabulary": 20, "positions": 10}
TOKENS = np.array([[3, 7, 19, 5, 0, 0], [1, 2, 0, 0, 0, 0], [9, 9, 4, 1, 11, 6]], np.int32)


def encoder(**options):
    return jt.models.text_encoder(3, **{**SIZES, **options})


@functools.cache
def model_and_variables():
    """A model that draws nothing, and lively variables of it."""
    model = encoder(pooling="mean", dropout=0.0)
    return model, jax.tree.map(jnp.asarray, jt.load_pretrained(bert_reference.weights(pooler=False), model).variables)


def run(model, variables, inputs):
    apply = jax.jit(lambda *given: model.apply(*given, train=False, key=None)[0])  # one program, not one an operation
    return apply(variables, inputs)


@pytest.mark.parametrize("how", ["pooler", "mean", "unit mean", "types and mask"])
def test_against_loops(how, x64):
    w = bert_reference.weights(pooler=how == "pooler")
    options = {"pooler": "tanh"} if how == "pooler" else {"pooling": "mean", "normalized": how == "unit mean"}
    model = encoder(param_dtype=jnp.float64, **options)
    variables = jt.load_pretrained(w, model).variables
    inputs, mask, types = TOKENS, TOKENS != 0, np.zeros_like(TOKENS)
    if how == "types and mask":  # a hole in a text, and two texts in a row
        mask, types = mask & (np.arange(6) != 1), np.tile([0, 0, 1, 1, 1, 1], (3, 1))
        inputs = {"tokens": TOKENS, "mask": mask.astype(np.int32), "types": types}
    found = run(model, variables, inputs)
    for row in range(3):
        layers = bert_reference.encode(w, TOKENS[row], mask[row], types[row], heads=2)
        for name, layer in zip(("stem", "stage1", "stage2"), layers, strict=True):
            np.testing.assert_allclose(found[name][row], layer, atol=1e-10)
        if how == "pooler":
            features = np.tanh(w["bert.pooler.dense.weight"] @ layers[-1][0] + w["bert.pooler.dense.bias"])
        else:
            features = layers[-1][mask[row]].mean(0)
        if how == "unit mean":
            features = features / np.sqrt((features**2).sum())
        np.testing.assert_allclose(found["features"][row], features, atol=1e-10)
        logits = w["classifier.weight"] @ features + w["classifier.bias"]
        np.testing.assert_allclose(found["logits"][row], logits, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_padding_changes_nothing(pooling):
    model, (_, variables) = encoder(pooling=pooling, dropout=0.0), model_and_variables()
    short = run(model, variables, TOKENS)
    for name, value in run(model, variables, np.pad(TOKENS, ((0, 0), (0, 4)))).items():
        value = value[:, :6] if value.ndim == 3 else value
        there = TOKENS > 0 if value.ndim == 3 else ...
        np.testing.assert_allclose(value[there], short[name][there], atol=1e-5)
    others = np.where(TOKENS == 0, 7, TOKENS)  # under the mask anything may stand
    masked = run(model, variables, {"tokens": others, "mask": TOKENS > 0})
    np.testing.assert_allclose(masked["features"], short["features"], atol=1e-5)
    assert np.abs(run(model, variables, others)["features"] - short["features"]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [False, True])
def test_a_row_of_padding_alone_is_finite_with_its_derivatives(normalized):
    model, (_, variables) = encoder(pooling="mean", normalized=normalized, dropout=0.0), model_and_variables()
    tokens = np.array([[0, 0, 0], [4, 5, 0]], np.int32)

    def loss(params):
        outputs = run(model, {"params": params}, tokens)
        return jnp.sum(outputs["features"] ** 3 + outputs["features"]), outputs["features"]

    (_, features), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert not features[0].any()
    assert features[1].any()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert jnp.abs(grads["stem_words"]["embedding"][4]).max() > 0
    assert not grads["stem_words"]["embedding"][7].any()


@pytest.mark.slow
def test_features_of_length_zero_have_no_direction_to_learn():
    model = encoder(pooling="mean", pooler="tanh", normalized=True, dropout=0.0)  # a fresh pooler makes 0 of 0
    tokens = jnp.array([[0, 0, 0], [4, 5, 0]], jnp.int32)
    variables = model.init(jax.random.key(0), tokens)

    @jax.jit
    @jax.grad
    def slope(params):
        return jnp.sum(model.apply({"params": params}, tokens, train=False, key=None)[0]["features"])

    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope(variables["params"])))
    assert 1e-3 < largest < 1e3


@pytest.mark.slow
def test_derivatives_are_those_of_finite_differences(x64):
    w = bert_reference.weights(classes=3)
    model = encoder(param_dtype=jnp.float64, pooler="tanh", normalized=True, dropout=0.0)
    params = jax.tree.map(jnp.asarray, jt.load_pretrained(w, model).variables["params"])
    keys = iter(jax.random.split(jax.random.key(1), 100))
    direction = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), params)

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        return jnp.sum(jnp.cos(run(model, {"params": moved}, TOKENS)["logits"]))

    step = 1e-5
    np.testing.assert_allclose(jax.grad(loss)(0.0), (loss(step) - loss(-step)) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.array([[3, 20]]), "expected tokens from 0 to 19, as the model knows; got 20"),
        (np.array([[3, -1]]), "got -1"),
        (np.ones((1, 11), np.int32), "1 to 10 tokens.*got 11"),
        (np.ones((1, 0), np.int32), "got 0"),
        (np.ones((1, 4), np.float32), r"whole numbers \[B, T\]; got float32"),
        (np.zeros((1, 8, 8, 3), np.uint8), "got uint8"),
        ({"tokens": np.ones((1, 4), np.int32), "mask": np.ones((1, 3))}, "expected mask of the tokens' shape"),
        ({"tokens": np.ones((1, 2), np.int32), "types": np.array([[0, 2]])}, "expected types from 0 to 1"),
        ({"mask": np.ones((1, 3))}, "expected the tokens"),
        ({"tokens": np.ones((1, 2), np.int32), "image": 0}, "unknown input of a text encoder 'image'"),
    ],
)
def test_what_are_no_texts_is_refused(inputs, message):
    model, variables = model_and_variables()
    with pytest.raises(jt.InputError, match=message):
        model.apply(variables, inputs, train=False, key=None)


def test_in_a_program_tokens_out_of_range_give_nan_and_never_another_word():
    model, variables = model_and_variables()
    features = jax.jit(lambda x: run(model, variables, x)["features"])(np.array([[3, -1], [20, 3], [3, 4]], np.int32))
    assert np.isnan(features[:2]).all()
    assert np.isfinite(features[2]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "divides the width 8; got 3"),
        ({"pooling": "max"}, "unknown pooling 'max'"),
        ({"pooler": "gelu"}, "unknown pooler 'gelu'"),
        ({"types": -1}, "expected types of 0 at least; got -1"),
        ({"heads": 0}, "divides the width 8; got 0"),
        ({"depth": 0}, "expected depth of 1 at least; got 0"),
        ({"positions": 0}, "expected positions of 1 at least; got 0"),
    ],
)
def test_impossible_encoders_are_refused(options, message):
    with pytest.raises(jt.InputError, match=message):
        encoder(**options)


def test_without_types_none_can_be_given():
    model = encoder(types=0)
    variables = model.init(jax.random.key(0), TOKENS)
    assert "stem_types" not in variables["params"]
    with pytest.raises(jt.InputError, match="unknown input of a text encoder 'types'"):
        model.apply(variables, {"tokens": TOKENS, "types": TOKENS}, train=False, key=None)


@pytest.mark.slow
def test_dropout_draws_by_the_key_and_each_text_for_itself():
    model, (_, variables) = encoder(dropout=0.5), model_and_variables()
    tokens = np.tile(TOKENS[2:], (2, 1))
    draw = jax.jit(lambda key: model.apply(variables, tokens, train=True, key=key)[0])
    one, same, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
    np.testing.assert_array_equal(one["logits"], same["logits"])
    for name in ("stem", "stage1", "logits"):
        assert not np.array_equal(one[name], other[name])
        assert not np.array_equal(one[name][0], one[name][1])


@pytest.mark.slow
def test_half_precision():
    model, (full, variables) = encoder(pooling="mean", dropout=0.0, dtype=jnp.bfloat16), model_and_variables()
    found = jax.jit(functools.partial(run, model))(variables, TOKENS)
    assert found["stage2"].dtype == found["features"].dtype == jnp.bfloat16
    assert found["logits"].dtype == jnp.float32
    wanted = run(full, variables, TOKENS)["features"]
    np.testing.assert_allclose(found["features"].astype(np.float32), wanted, atol=0.05)


@pytest.mark.slow
def test_it_trains_stage_by_stage_and_in_micro_batches():
    """The upper half tells words that praise from words that blame, by vectors that stay as drawn: 0.73 here."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    tokens = rng.integers(1, 10, (64, 5)) + 10 * labels[:, None] * (np.arange(5) == 2)
    data = jt.data.Dataset.from_columns(tokens=tokens.astype(np.int32), label=labels)
    model = jt.models.text_encoder(2, **SIZES, pooling="mean")
    start = model.init(jax.random.key(3), tokens[:1])["params"]
    frozen = [f"model/(?:{stage})" for stage in model.stages[:2]]
    optimizer = jt.optim.layerwise_decay(jt.optim.freeze(optax.adam(1e-2), frozen), model.stages, decay=0.9)
    objective = jt.classification(jt.micro_batched(model, 2), view="tokens")
    fitted = jt.fit(objective, optimizer, jt.data.pipeline(data, 32), steps=40, params={"model": start})
    found = jt.evaluate(objective, fitted.state, jt.data.eval_batches(data, 48))  # the second one is half padding
    assert found["accuracy"] > 0.65
    before, after = (jt.tree.leaves_by_path(tree) for tree in (start, fitted.state.params["model"]))
    for path in before:
        if path.startswith(("stem", "stage1")):
            np.testing.assert_array_equal(after[path], before[path])
    assert not np.array_equal(after["stage2/fc1/kernel"], before["stage2/fc1/kernel"])


def test_a_run_can_say_how_it_is_made():
    model = encoder(pooling="mean", normalized=True, dtype=jnp.bfloat16)
    again = jt.models.rebuild(jt.models.describe(model))
    assert again.recipe.arguments == model.recipe.arguments
    assert model.stages == ("stem_.*", "stage1", "stage2", "head")
    assert encoder(pooler="relu").stages[2] == "stage2|pooler"
