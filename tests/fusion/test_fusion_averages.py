"""Means of weights, the line and the arc between two models, soups, and what holds of every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusion_trees import as_jax, assert_close, assert_params, by_entry, flat, network

import jaxtransfer as jt

F = jt.fusion
BASE = network(0)
MODELS = [network(seed, near=BASE) for seed in (1, 2, 3)]
FISHERS = [
    jax.tree.map(lambda leaf, n=n: np.random.default_rng(n).uniform(size=leaf.shape) ** 2, BASE["params"])
    for n in range(3)
]
GRAM = {"head/kernel": np.eye(8) + 0.1}

# Every method as a function of the models alone; the second column: whether w, w, w gives w.
METHODS = {
    "average": (lambda models: F.average(models), True),
    "weighted": (lambda models: F.average(models, weights=range(1, 1 + len(models))), True),
    "slerp": (lambda models: F.slerp(models[0], models[-1], t=0.3), True),
    "wise_ft": (lambda models: F.wise_ft(models[0], models[-1], alpha=0.25), True),
    "task_arithmetic": (lambda models: F.task_arithmetic(BASE, models, scale=0.3), False),
    "task mean": (lambda models: F.task_arithmetic(BASE, models, consensus=F.weighted_mean), True),
    "ties": (lambda models: F.ties(BASE, models), False),
    "ties of all": (lambda models: F.ties(BASE, models, density=1), True),
    "ties of all, mergekit": (lambda models: F.ties(BASE, models, density=1, consensus=F.weighted_disjoint_mean), True),
    "ties of the whole": (lambda models: F.ties(BASE, models, whole=True), False),
    "breadcrumbs": (lambda models: F.breadcrumbs(BASE, models), False),
    "model_stock": (lambda models: F.model_stock(BASE, models), True),
    "model_stock by filter": (lambda models: F.model_stock(BASE, models, filters=-1), True),
    "fisher": (lambda models: F.fisher(models, FISHERS[: len(models)]), True),
    "regmean": (lambda models: F.regmean(models, [GRAM] * len(models)), True),
    "knots": (lambda models: F.knots(BASE, models), False),
    "dare": (lambda models: F.dare(BASE, models, key=3), False),
    "della": (lambda models: F.della(BASE, models, key=3), False),
    "soup": (lambda models: F.greedy_soup(models, lambda tree: float(tree["params"]["head"]["gain"])).tree, True),
}
ORDERED = {"slerp", "wise_ft", "weighted", "fisher", "dare", "della"}  # they tell the models apart


@pytest.mark.parametrize("name", METHODS)
def test_holds_of_every_method(name):
    method, itself = METHODS[name]
    before = jax.tree.map(np.array, MODELS)
    result = method(MODELS)
    for old, new in zip(before, MODELS, strict=True):  # nothing is written into what was given
        assert_close(old, new, atol=0)
    assert jax.tree.structure(result) == jax.tree.structure(BASE)
    for path, leaf in flat(result).items():
        assert leaf.dtype == flat(BASE)[path].dtype
        assert np.all(np.isfinite(leaf))
    assert isinstance(result["params"]["head"]["bias"], np.ndarray)
    assert np.all(result["batch_stats"]["norm"]["var"] > 0)
    if name not in ORDERED:
        assert_close(method(MODELS[::-1])["params"], result["params"], atol=1e-7)
    if itself:
        assert_close(method([MODELS[0]] * 3)["params"], MODELS[0]["params"], atol=1e-7)
    with pytest.raises(jt.InputError, match="differ at 'params/head/bias': float32\\[3\\] against float32\\[2\\]"):
        method([*MODELS[:2], jax.tree.map(lambda x: x[:2] if x.shape == (3,) else x, MODELS[2])])


@pytest.mark.parametrize("name", [name for name, (_, itself) in METHODS.items() if itself])
def test_a_model_far_from_the_base_merged_with_itself_is_itself(name):
    """To the last bit that matters, where weights are a million times smaller than what was added to the base."""
    params = jax.tree.map(lambda leaf: leaf * np.float32(1e-6), network(7)["params"])
    far = {**network(7), "params": params}
    found = flat(METHODS[name][0]([far] * 3)["params"])
    for path, leaf in flat(params).items():
        np.testing.assert_allclose(found[path], leaf, rtol=3e-7, err_msg=path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_a_weight_that_is_not_finite_is_refused_by_every_method(name, value):
    broken = jax.tree.map(np.copy, MODELS[1])
    broken["params"]["head"]["kernel"][0, 0] = value
    with pytest.raises(jt.InputError, match=r"(model 0|the base) has NaN or inf at 'params/head/kernel'"):
        METHODS[name][0]([broken, MODELS[0]])
    broken = jax.tree.map(np.copy, MODELS[1])
    broken["batch_stats"]["norm"]["mean"][0] = value  # what is renewed anyway
    assert all(np.all(np.isfinite(leaf)) for leaf in flat(METHODS[name][0]([MODELS[0], broken])["params"]).values())


def test_average_is_the_weighted_mean():
    weights = [0.2, 0.5, -0.1]
    for normalize in (True, False):
        total = sum(weights) if normalize else 1
        expected = by_entry(MODELS, BASE, lambda v, s, t=total: sum(w * x for w, x in zip(weights, v, strict=True)) / t)
        assert_params(F.average(MODELS, weights=weights, normalize=normalize), expected)


def test_the_ends_of_a_line_are_the_models_with_their_statistics():
    one, two = (jax.tree.map(np.array, model) for model in MODELS[:2])
    for found, want in (
        (F.wise_ft(one, two, alpha=0), one),
        (F.wise_ft(one, two, alpha=1), two),
        (F.slerp(one, two, t=0), one),
        (F.slerp(one, two, t=1), two),
        (F.average([one, two], weights=[1, 0]), one),
    ):
        want["batch_stats"]["norm"]["count"] = found["batch_stats"]["norm"]["count"]  # is not mixed
        assert_close(found, want, atol=1e-7)
    between = F.wise_ft(one, two, alpha=0.25)["batch_stats"]["norm"]["var"]
    variances = [model["batch_stats"]["norm"]["var"] for model in (one, two)]
    np.testing.assert_allclose(between, 0.75 * variances[0] + 0.25 * variances[1], rtol=1e-6)
    extrapolated = F.average([one, two], weights=[4, -3])["batch_stats"]["norm"]["var"]
    np.testing.assert_allclose(extrapolated, np.mean(variances, 0), rtol=1e-6)  # no variance is negative


def test_running_state_is_averaged_and_counters_stay():
    found = F.ties(BASE, MODELS, density=0.1, scale=-3)["batch_stats"]["norm"]
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], np.mean([m["batch_stats"]["norm"][name] for m in MODELS], 0), rtol=1e-6)
    assert found["count"] == BASE["batch_stats"]["norm"]["count"]
    assert F.average(MODELS)["batch_stats"]["norm"]["count"] == MODELS[0]["batch_stats"]["norm"]["count"]


@pytest.mark.parametrize("merge", [F.ties, F.model_stock, functools.partial(F.dare, key=1)])
def test_half_precision_is_computed_in_single_and_given_back(merge):
    base, *halves = (as_jax(tree, jnp.bfloat16) for tree in (BASE, *MODELS))
    found = merge(base, halves)
    wide = [jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in (base, *halves)]
    expected = merge(wide[0], wide[1:])
    for path, leaf in flat(jax.tree.map(np.asarray, found["params"])).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, flat(expected["params"])[path].astype(jnp.bfloat16))
    assert isinstance(found["params"]["head"]["bias"], jax.Array)


def test_a_sum_of_halves_is_not_made_in_half_precision():
    models = [{"w": jnp.full(3, value, jnp.bfloat16)} for value in (256.0, 1.0, 1.0, 1.0, 1.0)]
    summed = F.average(models, weights=[1] * 5, normalize=False)  # 256 + 1 is 256 in bfloat16
    np.testing.assert_array_equal(np.asarray(summed["w"], np.float32), 260)


def test_keys_and_masks_stay():
    tree = {"w": jnp.ones(2), "key": jax.random.key(1), "mask": np.array([True, False]), "none": None}
    found = F.average([tree, {**tree, "mask": np.array([False, False])}])
    assert found["key"] is tree["key"]
    np.testing.assert_array_equal(found["mask"], tree["mask"])
    assert F.task_vector(tree, tree)["key"] is tree["key"]


def test_leaves_stay_where_they_are():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    placed = jax.device_put(jnp.arange(4.0), jax.NamedSharding(mesh, jax.P("data")))
    assert F.average([{"w": placed}, {"w": placed}])["w"].sharding == placed.sharding


def test_slerp_keeps_lengths_and_is_mergekits():
    one, two = MODELS[0], network(9)

    def arc(values, start):
        a, b = values
        cosine = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
        if abs(cosine) > 0.9995:
            return 0.7 * a + 0.3 * b
        angle = np.arccos(cosine)
        return (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)

    found = F.slerp(one, two, t=0.3)
    assert_params(found, by_entry([one, two], BASE, arc))
    assert_close(F.slerp(two, one, t=0.7)["params"], found["params"])
    assert_close(F.slerp(one, two, t=0)["params"], one["params"])
    e1, e2 = {"w": np.array([1.0, 0.0])}, {"w": np.array([0.0, 1.0])}
    np.testing.assert_allclose(F.slerp(e1, e2, t=0.5)["w"], np.sqrt([0.5, 0.5]))
    np.testing.assert_allclose(F.slerp(e1, {"w": -e1["w"]}, t=0.25)["w"], [0.5, 0])  # opposed: linear, as there
    np.testing.assert_allclose(F.slerp({"w": np.zeros(2)}, e2, t=1)["w"], [0, 1], atol=1e-15)


def test_wise_ft():
    expected = by_entry(MODELS[:1], BASE, lambda v, s: 0.25 * s + 0.75 * v[0])
    assert_params(F.wise_ft(BASE, MODELS[0], alpha=0.75), expected)
    assert_close(F.wise_ft(BASE, MODELS[0], alpha=0)["params"], BASE["params"])


def test_task_vectors_add_and_take_away():
    vector = F.task_vector(MODELS[0], BASE)
    assert_close(F.apply_task_vector(BASE, vector)["params"], MODELS[0]["params"])
    assert_close(F.apply_task_vector(BASE, vector)["batch_stats"], BASE["batch_stats"])
    forgot = F.apply_task_vector(BASE, vector, scale=-1)
    assert_params(forgot, by_entry(MODELS[:1], BASE, lambda v, s: 2 * s - v[0]))
    weights = [1, -1, 0.5]
    expected = by_entry(MODELS, BASE, lambda v, s: s + 0.4 * sum(w * (x - s) for w, x in zip(weights, v, strict=True)))
    assert_params(F.task_arithmetic(BASE, MODELS, weights=weights, scale=0.4), expected)
    half = F.task_vector(as_jax(MODELS[0], jnp.bfloat16), as_jax(BASE, jnp.bfloat16))
    assert half["params"]["head"]["kernel"].dtype == np.float32
    with pytest.raises(jt.InputError, match="match its base by path and shape"):
        F.apply_task_vector(BASE, vector["params"])


def test_a_greedy_soup():
    good, bad = {"w": np.array([0.0, 0.0])}, {"w": np.array([5.0, 5.0])}
    left, right = {"w": np.array([-1.0, 0.5])}, {"w": np.array([1.2, -0.5])}
    seen = []

    def score(tree):
        seen.append(tree)
        return -float(np.abs(tree["w"]).sum())

    soup = F.greedy_soup([bad, left, right], score, renew=lambda tree: {"w": tree["w"] + 0.0})
    assert soup.members == (1, 2)
    np.testing.assert_allclose(soup.tree["w"], [0.1, 0])
    assert soup.score == pytest.approx(-0.1)
    assert soup.scores == pytest.approx((-10, -1.5, -1.7))
    assert len(seen) == 5
    assert F.greedy_soup([good, left, right], score).members == (0,)
    assert F.greedy_soup([left], score).tree is left
    with pytest.raises(jt.InputError, match="score of model 0 is not a number"):
        F.greedy_soup([left], lambda tree: float("nan"))


REFUSED = {
    "a number": (lambda: F.ties(BASE, [{**BASE, "params": 1.0}], whole=True), "as leaves; model 0/params is a float"),
    "a base": (lambda: F.ties({"params": 1.0}, MODELS, whole=True), "as leaves; the base/params is a float"),
    "no model": (lambda: F.average([]), "one model or more"),
    "a tree": (lambda: F.average(BASE), "list of trees"),
    "weights": (lambda: F.average(MODELS, weights=[1, 2]), "3 finite numbers"),
    "no weights": (lambda: F.average(MODELS, weights="abc"), "3 numbers, one a model"),
    "weights of 0": (lambda: F.average(MODELS, weights=[1, -1, 0]), r"must not sum to 0, .* got \[1.0, -1.0, 0.0\]"),
    "alpha": (lambda: F.wise_ft(BASE, BASE, alpha=1.5), r"alpha must be in \[0, 1\]; got 1.5"),
    "t": (lambda: F.slerp(BASE, BASE, t=float("nan")), r"t must be in \[0, 1\]"),
    "a path": (lambda: F.average([BASE["params"], {}]), "differ at 'head/bias': float32\\[3\\] against nothing"),
    "a type": (lambda: F.average([{"w": np.ones(2)}, {"w": np.ones(2, np.float32)}]), "float64.* against float32"),
    "no arrays": (lambda: F.average([{"w": 1.0}]), "model 0/w is a float"),
    "scale": (lambda: F.task_arithmetic(BASE, MODELS, scale=float("inf")), "scale must be a finite number"),
    "a scale of letters": (lambda: F.task_arithmetic(BASE, MODELS, scale="2"), "scale must be a finite number"),
    "density": (lambda: F.ties(BASE, MODELS, density=2), "density must be in"),
    "gamma": (lambda: F.breadcrumbs(BASE, MODELS, gamma=-1), "gamma must be in"),
    "nothing kept": (lambda: F.dare(BASE, MODELS, key=0, density=0), r"in \(0, 1\]"),
    "epsilon": (lambda: F.della(BASE, MODELS, key=0, density=0.9, epsilon=0.2), "density ± epsilon"),
    "key": (lambda: F.dare(BASE, MODELS, key="a"), "expected a key"),
    "seed": (lambda: F.dare(BASE, MODELS, key=-1), "not be negative"),
    "axis": (lambda: F.della(BASE, MODELS, key=0, axis=3), "axis 3 is none"),
    "one model": (lambda: F.model_stock(BASE, MODELS[:1]), "two models or more"),
    "filters": (lambda: F.model_stock(BASE, MODELS, filters=2), "no axis of a leaf"),
    "no Fisher": (lambda: F.fisher(MODELS, FISHERS[:1]), "of each of 3 models"),
    "another Fisher": (lambda: F.fisher(MODELS, [{}] * 3), "must match its parameters"),
    "a Fisher of a run that diverged": (
        lambda: F.fisher(MODELS, [FISHERS[0], FISHERS[1], jax.tree.map(lambda leaf: leaf * np.inf, FISHERS[2])]),
        "of model 2 at .* or not finite",
    ),
    "a negative Fisher": (
        lambda: F.fisher(MODELS, [jax.tree.map(np.negative, own) for own in FISHERS]),
        "of model 0 at 'params/head/bias' is negative",
    ),
    "floor": (lambda: F.fisher(MODELS, FISHERS, floor=0), "floor must be positive"),
    "no gram": (lambda: F.regmean(MODELS, [GRAM]), "of each of 3 models"),
    "a gram of nothing": (lambda: F.regmean(MODELS, [{"hed/kernel": np.eye(8)}] * 3), "which is no leaf"),
    "a gram of another size": (lambda: F.regmean(MODELS, [{"head/kernel": np.eye(7)}] * 3), r"must be \[D, D\]"),
    "a gram of a run that diverged": (
        lambda: F.regmean(MODELS, [GRAM, GRAM, {"head/kernel": np.full((8, 8), np.nan)}]),
        "of 'head/kernel' of model 2 is not finite",
    ),
    "grams of others": (lambda: F.regmean(MODELS, [GRAM, GRAM, {}]), "of the same kernels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, message = REFUSED[name]
    with pytest.raises(jt.InputError, match=message):
        call()


def test_names_in_the_message():
    with pytest.raises(jt.InputError, match="but run a and run b differ at 'x'"):
        F.check_alike([{}, {"x": np.ones(1)}], names=("run a", "run b"))
    F.check_alike([{"a": np.ones(1), "b": np.ones(2)}, {"b": np.ones(2), "a": np.ones(1)}])


def test_heads_are_matched_by_name():
    names, wanted = ["cat", "dog", "emu"], ["emu", "cat", "dog"]
    found = F.match_heads(BASE, names, wanted, head="head/(kernel|bias)")
    np.testing.assert_array_equal(found["params"]["head"]["kernel"], BASE["params"]["head"]["kernel"][:, [2, 0, 1]])
    np.testing.assert_array_equal(found["params"]["head"]["bias"], BASE["params"]["head"]["bias"][[2, 0, 1]])
    assert found["params"]["stem"]["kernel"] is BASE["params"]["stem"]["kernel"]
    assert_close(F.match_heads(found, wanted, names, head="head/(kernel|bias)"), BASE, atol=0)
    match = functools.partial(F.match_heads, BASE, head="head/bias")
    with pytest.raises(jt.InputError, match="lacks 'fox' and has besides 'emu'"):
        match(names, ["cat", "dog", "fox"])
    with pytest.raises(jt.InputError, match="'cat' is there twice"):
        match(names, ["cat", "cat", "dog"])
    with pytest.raises(jt.InputError, match=r"'params/head/bias' \[3\] is no head of 2 classes"):
        match(["a", "b"], ["b", "a"])
    with pytest.raises(jt.InputError, match="selects no parameter"):
        F.match_heads(BASE, names, wanted, head="classifier")
