import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt


def tree(value, classes, **more):
    full = lambda *shape: jnp.full(shape, value)  # noqa: E731
    body = {"stem": {"kernel": full(3, 4)}, "stage1": {"kernel": full(4, 5), "bias": full(5)}}
    return {"model": {**body, "head": {"kernel": full(5, classes), "bias": full(classes)}, **more}}


BODY = ("model/stage1/bias", "model/stage1/kernel", "model/stem/kernel")
HEAD = ("model/head/bias", "model/head/kernel")


def values(params):
    return {path: set(np.unique(leaf)) for path, leaf in jt.tree.leaves_by_path(params).items()}


def test_every_leaf_is_copied():
    source, into = tree(1.0, 3), tree(2.0, 3)
    params, report = jt.transfer(source, into)
    assert sorted(report.copied) == sorted(BODY + HEAD)
    assert report[1:] == ((), (), (), ())
    assert set.union(*values(params).values()) == {1.0}
    assert jax.tree.structure(params) == jax.tree.structure(into)


@pytest.mark.parametrize("reinit", ["head", ("head",), ("head/bias", "head/kernel"), "model/he.*"])
def test_a_new_head(reinit):
    params, report = jt.transfer(tree(1.0, 3), tree(2.0, 7), reinit=reinit)
    assert tuple(sorted(report.copied)) == BODY
    assert tuple(sorted(report.reinitialized)) == HEAD
    assert report[2:] == ((), (), ())
    got = values(params)
    assert {p: v for p, v in got.items() if p in HEAD} == {key: {2.0} for key in HEAD}
    assert {p: v for p, v in got.items() if p in BODY} == {key: {1.0} for key in BODY}
    assert params["model"]["head"]["kernel"].shape == (5, 7)


def test_reinit_applies_though_the_shapes_fit():
    params, report = jt.transfer(tree(1.0, 3), tree(2.0, 3), reinit="head")
    assert tuple(sorted(report.reinitialized)) == HEAD
    assert values(params)["model/head/kernel"] == {2.0}


def test_what_does_not_fit_is_a_loud_failure_with_the_whole_list():
    source, into = tree(1.0, 3, old={"w": jnp.ones(2)}), tree(2.0, 7, new={"w": jnp.ones(6)})
    with pytest.raises(jt.InputError) as error:
        jt.transfer(source, into)
    message = str(error.value)
    assert "- model/new/w (6,)" in message
    assert "+ model/old/w (2,)" in message
    assert "model/head/bias: expected (7,), got (3,)" in message
    assert "model/head/kernel: expected (5, 7), got (5, 3)" in message
    assert "reinit" in message
    assert "strict=False" in message
    jt.transfer(source, into, reinit=("head", "new", "old"))


def test_not_strict_only_reports():
    source, into = tree(1.0, 3, old={"w": jnp.ones(2)}), tree(2.0, 7, new={"w": jnp.full(6, 2.0)})
    params, report = jt.transfer(source, into, strict=False)
    assert tuple(sorted(report.copied)) == BODY
    assert report.reinitialized == ()
    assert report.missing == ("model/new/w (6,)",)
    assert report.extra == ("model/old/w (2,)",)
    assert len(report.misshaped) == 2
    assert all(wrong.startswith("model/head/") for wrong in report.misshaped)
    got = values(params)
    assert all(got[p] == {1.0} for p in BODY)
    assert all(got[p] == {2.0} for p in (*HEAD, "model/new/w"))
    assert "model/old/w" not in got
    text = str(report)
    assert text.startswith("3 copied, 0 reinitialized, 1 missing, 1 extra, 2 misshaped")
    assert "  missing: model/new/w (6,)" in text
    assert BODY[0] not in text


def test_nothing_in_common_is_an_error_even_when_not_strict():
    with pytest.raises(jt.InputError, match="nothing was transferred"):
        jt.transfer({"other": {"w": jnp.ones(2)}}, tree(1.0, 3), strict=False)
    with pytest.raises(jt.InputError, match="nothing was transferred"):
        jt.transfer(tree(1.0, 3), tree(1.0, 3), reinit=".*")


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(jt.InputError, match="reinit: the pattern 'haed' selects no parameter"):
        jt.transfer(tree(1.0, 3), tree(2.0, 3), reinit="haed")


def test_types_are_the_models_and_sources_may_be_numpy():
    source = jax.tree.map(lambda w: np.asarray(w, np.float16) + np.float16(0.5), tree(1.0, 3))
    into = jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree(2.0, 3))
    params, _ = jt.transfer(source, into, reinit="head/bias")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    assert values(params)["model/head/kernel"] == {1.5}
    assert values(params)["model/head/bias"] == {2.0}


def test_the_result_is_a_copy_of_both_trees(rng):
    """A run that starts from it donates its buffers; source and fresh weights stay readable."""
    model = jt.models.mlp(3, hidden=(4,))
    batch = {"image": rng.normal(size=(4, 3)).astype(np.float32), "label": np.arange(4) % 3}
    objective, optimizer = jt.classification(model), optax.sgd(0.1)
    source, _ = objective.init(jax.random.key(0), batch)
    fresh, _ = objective.init(jax.random.key(1), batch)
    kept = jax.tree.map(np.array, (source, fresh))
    merged, _ = jt.transfer(source, fresh, reinit="head")
    state = jt.init(objective, optimizer, jax.random.key(2), batch)._replace(params=merged)
    state, _ = jt.train_step(objective, optimizer)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(merged))
    chex.assert_trees_all_equal(kept, (source, fresh))
    numpy_source = jax.tree.map(np.array, source)
    merged, _ = jt.transfer(numpy_source, fresh)
    jax.tree.map(lambda leaf: leaf.fill(0), numpy_source)  # nor does it follow a later write
    chex.assert_trees_all_equal(merged, kept[0])
