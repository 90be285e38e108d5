"""A model's outputs as columns: equal to applying it, in memory and in a folder, refused where something changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

N = 11


def model_of(bad=None):
    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (4, 3))}, "stats": {"shift": jnp.ones(3)}}

    def apply(variables, x, *, train, key):
        assert not train
        flat = x.reshape(len(x), -1).astype(jnp.float32) / 255
        deep = flat @ variables["params"]["w"] + variables["stats"]["shift"][None]
        if bad is not None:
            deep = jnp.where(x.reshape(len(x), -1)[:, :1] == bad, jnp.nan, deep)
        outputs = {
            "features": deep,
            "map": deep.reshape(-1, 3, 1).astype(jnp.bfloat16),
            "half": deep.astype(jnp.float16),
        }
        return {**outputs, "class": jnp.argmax(deep, 1)}, {"stats": variables["stats"]}

    return jt.Model(init, apply, "encoder")


def data_of(seed=0):
    images = np.random.default_rng(seed).integers(0, 200, (N, 2, 2, 1)).astype(np.uint8)
    images[:, 0, 0, 0] = np.arange(N)
    return jt.data.Dataset.from_arrays(images, np.arange(N) % 2)


@pytest.fixture
def variables():
    return model_of().init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))


def expected(variables, data):
    flat = data.column("image").reshape(len(data), -1) / 255
    return flat @ np.asarray(variables["params"]["w"], float) + 1


OUTPUTS = ("features", "map", "half")


@pytest.mark.parametrize("size", [4, 11, 50])
def test_the_columns_are_the_outputs(variables, size):
    data = data_of()
    made = jt.features(model_of(), variables, data, OUTPUTS, batch_size=size)
    assert [made.entries[name].dtype for name in OUTPUTS] == [np.float32, np.float32, np.float16]
    np.testing.assert_allclose(made.column("features"), expected(variables, data), rtol=1e-5)
    np.testing.assert_allclose(made.column("map")[..., 0], expected(variables, data), rtol=1e-2)
    np.testing.assert_array_equal(made.column("image"), data.column("image"))
    part = data.select([7, 3])
    again = jt.features(model_of(), variables, part, {"deep": "features"}, batch_size=size)
    np.testing.assert_array_equal(again.column("deep"), made.column("features")[[7, 3]])
    with pytest.raises(jt.InputError, match="'features' was computed on unaugmented images"):
        jt.data.pipeline(made, 4, augment=jt.data.augment.random_flip())


def test_a_folder_holds_them_for_the_same_data_and_weights_alone(variables, tmp_path):
    data, folder = data_of(), tmp_path / "cache"
    first = jt.features(model_of(), variables, data, OUTPUTS, path=folder)
    np.testing.assert_allclose(first.column("features"), expected(variables, data), rtol=1e-5)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = jt.features(model_of(), variables, data, OUTPUTS, path=folder, batch_size=3)
    for name in OUTPUTS:
        np.testing.assert_array_equal(first.column(name), second.column(name))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    changed = {**variables, "stats": {"shift": 2 * jnp.ones(3)}}
    for other, source, outputs in (
        (changed, data, OUTPUTS),
        (variables, data_of(1), OUTPUTS),
        (variables, data.take(5), OUTPUTS),
        (variables, data, ("features",)),
    ):
        with pytest.raises(jt.InputError, match="holds another folder of features"):
            jt.features(model_of(), other, source, outputs, path=folder)


def test_a_damaged_folder_is_called_what_it_is_and_written_anew(variables, tmp_path):
    folder = tmp_path / "features"
    jt.features(model_of(), variables, data_of(), OUTPUTS, path=folder)
    cache = jt.data.open_outputs(folder)
    with pytest.raises(
        jt.InputError, match=r"the folder of features .* was written for .*; write it anew: jt\.features"
    ):
        cache.columns_for(data_of(1))
    (records,) = folder.glob("*array_record*")
    records.write_bytes(b"")
    with pytest.raises(jt.InputError, match=r"the folder of features .* is damaged: .*; the same call of jt\.features"):
        jt.data.open_outputs(folder)
    again = jt.features(model_of(), variables, data_of(), OUTPUTS, path=folder)
    np.testing.assert_allclose(again.column("features"), expected(variables, data_of()), rtol=1e-5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(jt.InputError, match="is there and is no folder of features"):
        jt.features(model_of(), variables, data_of(), OUTPUTS, path=tmp_path / "full")


def test_a_folder_is_of_one_normalisation(tmp_path):
    data = jt.data.Dataset.from_arrays(np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1), [0, 1])
    plain = jt.models.mlp(2, hidden=())
    variables = plain.init(jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32))
    first = jt.models.normalize(plain, 0.5, 0.25)
    for _ in range(2):
        made = jt.features(first, variables, data, "logits", path=tmp_path / "f")
        wanted, _ = first.apply(variables, data.read([0, 1])["image"], train=False, key=None)
        np.testing.assert_allclose(made.column("logits"), wanted["logits"], rtol=1e-5, atol=1e-6)
    with pytest.raises(jt.InputError, match="holds another folder of features"):
        jt.features(jt.models.normalize(plain, 0.1, 0.25), variables, data, "logits", path=tmp_path / "f")


def test_columns_of_any_data(tmp_path):
    data = jt.data.Dataset.from_columns(tokens=np.arange(12).reshape(6, 2), label=np.arange(6) % 2)
    model = jt.Model(
        lambda key, x: {"params": {}},
        lambda variables, x, *, train, key: ({"features": x.astype(jnp.float32) ** 2}, {}),
        "squares",
    )
    for path in (None, tmp_path / "folder"):
        made = jt.features(model, {"params": {}}, data, view="tokens", batch_size=4, path=path)
        np.testing.assert_array_equal(made.column("features"), data.column("tokens") ** 2)
        assert made.read([3])["tokens"].tolist() == [[6, 7]]
    probe = jt.classification(jt.models.mlp(2, hidden=()), view="features")
    fitted = jt.fit(probe, optax.sgd(1e-3), jt.data.pipeline(made, 3), steps=2)
    state = jt.TrainState.of({"squares": {}})
    again = jt.features(model, state, made, {"twice": "features"}, view="features")
    np.testing.assert_array_equal(again.column("twice"), data.column("tokens").astype(float) ** 4)
    assert int(fitted.state.step) == 2


def test_data_without_images_are_read_where_one_column_is_likely():
    model = jt.Model(lambda key, x: {}, lambda variables, x, *, train, key: ({"twice": 2.0 * x}, {}), "twice")
    data = jt.data.Dataset.from_columns(features=np.eye(3, dtype=np.float32), label=[0, 1, 0])
    np.testing.assert_array_equal(jt.features(model, {"params": {}}, data, "twice").column("twice"), 2 * np.eye(3))
    both = data.with_columns({"tokens": np.zeros((3, 2), np.int32)})
    with pytest.raises(
        jt.InputError, match=r"has no column 'image'; it has features, label, tokens; name the one .*view="
    ):
        jt.features(model, {"params": {}}, both, "twice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ("feature",)}, "model 'encoder' has no output 'feature'; it has class, features, half, map"),
        ({"outputs": "class"}, "output 'class' is int32, expected floating numbers"),
        ({"outputs": {"label": "features"}}, "a column is called 'label' already"),
        ({"outputs": ()}, "one output or more"),
        ({"view": "pixels"}, "has no column 'pixels'; it has image, label"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"dataset": data_of().take(0)}, "got no examples"),
        ({"dataset": [1, 2]}, "takes a jt.data.Dataset, got a list"),
        ({"model": model_of(bad=6)}, "output 'features' of example 6 is not finite"),
    ],
)
def test_what_can_not_be_computed(variables, changes, message):
    arguments = {"model": model_of(), "variables": variables, "dataset": data_of(), "batch_size": 4, **changes}
    with pytest.raises(jt.InputError, match=message):
        jt.features(**arguments)
