"""Zipped batches of unequal size in `fit`: exact resumption, devices, what parts forbid, what a run notes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.train import batches

STEPS = 6


def model_of():
    def init(key, x):
        return {"params": {"w": 0.1 * jax.random.normal(key, (x[0].size, 3))}, "stats": {"mean": jnp.zeros(3)}}

    def apply(variables, x, *, train, key, axis=None):
        out = x.reshape(len(x), -1).astype(jnp.float32) @ variables["params"]["w"]
        mean = out.mean(0)
        if axis is not None:
            mean = jax.lax.pmean(mean, axis)
        kept = 0.9 * variables["stats"]["mean"] + 0.1 * mean
        stats = {"mean": kept if train else variables["stats"]["mean"]}
        return {"logits": out - (mean if train else stats["mean"])[None]}, {"stats": stats}

    return jt.Model(init, apply, "model")


def domain(count, seed, columns=False):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 2, 2, 1)).astype(np.uint8)
    data = jt.data.Dataset.from_arrays(images, rng.integers(0, 3, count))
    return data.with_columns({"teacher_logits": np.zeros((count, 3), np.float32)}, of_image=True) if columns else data


def both(seed=0, **options):
    source = jt.data.pipeline(domain(20, 1), 8, seed=seed, threads=0)
    return jt.data.zipped(source=source, target=jt.data.pipeline(domain(11, 2, **options), 4, seed=seed, threads=0))


def entropy(model):
    forward = jt.Forward.of(model)

    def loss(outputs, params, state, batch, ctx):
        scores = jax.nn.log_softmax(outputs[forward]["logits"])
        value = ctx.mean(-jnp.sum(jnp.exp(scores) * scores, -1), batch.get("mask"))
        return value.value, state, {"entropy": value}

    return jt.Objective("entropy", (forward,), loss)


def objective_of(model):
    return jt.classification(model).on("source") + 0.3 * entropy(model).on("target")


def noise(key, image):
    return image + 0.1 * jax.random.normal(key, image.shape)


VIEWS = jt.data.views
TRANSFORM = VIEWS.in_turn(VIEWS.on("source", VIEWS.augmented(noise)), VIEWS.on("target", VIEWS.augmented(noise)))


def fit(data, **options):
    options = {"steps": STEPS, "log_every": 1, "save_every": 2, "transform": TRANSFORM, **options}
    return jt.fit(objective_of(model_of()), optax.adam(0.05), data, **options)


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_bits(tmp_path):
    whole = fit(both(), out=tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop(record):
        if record["step"] == 4:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(both(), out=tmp_path / "part", log=stop)
    again = fit(both(), out=tmp_path / "part")
    for one, other in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(again.state.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(again.history) == STEPS
    with pytest.raises(jt.InputError, match=r"another configuration \(source/data seed: 0 there, 5 now; target/data s"):
        fit(both(seed=5), out=tmp_path / "part")
    source = both().parts["source"]
    other = jt.data.zipped(source=source, target=jt.data.pipeline(domain(11, 3), 4, threads=0))
    with pytest.raises(jt.InputError, match=r"another configuration \(target/labels; target/images\)"):
        fit(other, out=tmp_path / "part")
    larger = jt.data.zipped(source=source, target=jt.data.pipeline(domain(11, 2), 8, threads=0))
    with pytest.raises(jt.InputError, match=r"another configuration \(target/batch size: 4 there, 8 now\)"):
        fit(larger, out=tmp_path / "part")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_devices_see_the_same_rows(mode):
    """Four devices have two rows of the one part and one of the other; views are drawn by the rows of each part."""
    alone = fit(both(), steps=3)
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    spread = fit(both(), steps=3, mesh=mesh, mode=mode)
    for one, other in zip(jax.tree.leaves(alone.state.params), jax.tree.leaves(spread.state.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert spread.history[0]["train/loss"] == pytest.approx(alone.history[0]["train/loss"], abs=1e-5)


def test_rows_of_a_part_count_within_it():
    seen = {}

    def note(name):
        def transform(key, batch, rows):
            seen[name] = rows, key
            return batch

        return VIEWS.on(name, transform)

    batch = both().batch(0)
    whole = VIEWS.in_turn(note("source"), note("target"))
    for device in (0, 3):
        whole(jax.random.key(0), batch, 8 * device + jnp.arange(8))  # the first part's rows, as the step numbers them
        assert seen["source"][0].tolist() == list(range(8 * device, 8 * device + 8))
        assert seen["target"][0].tolist() == list(range(4 * device, 4 * device + 4))
    assert jnp.any(jax.random.key_data(seen["source"][1]) != jax.random.key_data(seen["target"][1]))
    with pytest.raises(jt.InputError, match="expected a part 'other' in zipped batches; the batch has source, target"):
        note("other")(jax.random.key(0), batch, jnp.arange(8))


def test_what_a_part_forbids_the_whole_forbids():
    with pytest.raises(jt.InputError, match="column 'target/teacher_logits' of the data holds for the images as they"):
        fit(both(columns=True))
    deep = jt.data.zipped(all=both(columns=True))
    with pytest.raises(jt.InputError, match="column 'all/target/teacher_logits'"):
        fit(deep)
    batches.check_transform(None, deep)


def test_copies_of_examples_are_looked_for_in_the_parts_that_a_term_reads():
    model = model_of()
    apart = jt.Objective("apart", (jt.Forward.of(model),), lambda *_: None, apart=0)
    small = jt.data.zipped(source=jt.data.pipeline(domain(20, 1), 8), target=jt.data.pipeline(domain(3, 1), 4))
    batches.check_apart(apart.on("source") + entropy(model).on("target"), small)
    with pytest.raises(jt.InputError, match="target: a batch of 4 of 3 examples holds some of them twice"):
        batches.check_apart(entropy(model).on("source") + 0.5 * apart.on("target"), small)
    with pytest.raises(jt.InputError, match="all/target: a batch of 4 of 3"):
        batches.check_apart(apart.on("target").on("all"), jt.data.zipped(all=small))
    queue = jt.Objective("queue", (jt.Forward.of(model),), lambda *_: None, apart=10).on("target")
    data = both()
    with pytest.raises(jt.InputError, match="target: a queue of 10 and a batch of 4 are more than the 11 examples"):
        batches.check_apart(queue, data)
    columns = {"image": domain(11, 2).column("image"), "index": np.arange(11)}
    for made in (jt.data.Dataset.from_columns(columns), domain(11, 2).with_columns({"index": np.arange(11)})):
        numbered = jt.data.pipeline(made, 4)
        batches.check_apart(queue, jt.data.zipped(source=data.parts["source"], target=numbered))
        batches.check_apart(jt.Objective("queue", (jt.Forward.of(model),), lambda *_: None, apart=10), numbered)


def test_zipped_evaluation_counts_every_example_once():
    model = model_of()
    objective = objective_of(model)
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), both().batch(0))
    one, other = (jt.data.eval_batches(domain(count, seed), size) for count, seed, size in ((20, 1, 8), (11, 2, 2)))
    found = jt.evaluate(objective, state, jt.data.zipped(source=one, target=other))
    expected = jt.evaluate(jt.classification(model), state, one) | jt.evaluate(entropy(model), state, other)
    assert found["source/accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert found["source/classification"] == pytest.approx(expected["classification"], abs=1e-6)
    assert found["target/entropy"] == pytest.approx(expected["entropy"], abs=1e-6)


def test_the_clock_counts_the_rows_of_all_parts():
    assert batches.rows_in(both(), both().batch(0)) == 12
    assert batches.rows_in(jt.data.pipeline(domain(20, 1), 8), domain(20, 1).read(np.arange(8))) == 8
    assert batches.rows_in([], {"support": {"x": np.zeros((4, 2))}, "query": {"x": np.zeros((4, 3))}}) == 4
