"""Methods of task vectors, entry by entry: the forms that peft and mergekit released, and the papers'."""

import functools

import jax
import numpy as np
import pytest
from fusion_trees import assert_close, assert_params, by_entry, flat, network

import jaxtransfer as jt

F = jt.fusion
BASE = network(0)
MODELS = [network(seed, near=BASE) for seed in (1, 2, 3)]
WEIGHTS = [0.5, -0.2, 0.9]


def elected(vectors, weights, *, weigh_votes, divide, by_count=False):
    """TIES' election, one entry after the other: vectors [N, n]."""
    out = np.zeros(vectors.shape[1])
    for entry in range(vectors.shape[1]):
        votes = [(w if weigh_votes else 1) * v[entry] for w, v in zip(weights, vectors, strict=True)]
        total = sum(float(np.sign(vote)) if by_count else vote for vote in votes)
        sign = 1 if total >= 0 else -1
        inside = [n for n, vote in enumerate(votes) if vote != 0 and (vote > 0) == (sign > 0)]
        below = {"count": len(inside), "weights": sum(weights[n] for n in inside), "nothing": 1}[divide]
        out[entry] = sum(weights[n] * vectors[n][entry] for n in inside) / (below or 1)
    return out


CONSENSUS = {  # name → (ours, the form entry by entry)
    "peft": (F.disjoint_mean, {"weigh_votes": False, "divide": "count"}),
    "peft by frequency": (
        functools.partial(F.disjoint_mean, by_count=True),
        {"weigh_votes": False, "divide": "count", "by_count": True},
    ),
    "mergekit": (F.weighted_disjoint_mean, {"weigh_votes": True, "divide": "weights"}),
    "mergekit by count": (
        functools.partial(F.weighted_disjoint_mean, by_count=True),
        {"weigh_votes": True, "divide": "weights", "by_count": True},
    ),
    "mergekit, no normalize": (F.weighted_disjoint_sum, {"weigh_votes": True, "divide": "nothing"}),
    "mergekit, no normalize, by count": (
        functools.partial(F.weighted_disjoint_sum, by_count=True),
        {"weigh_votes": True, "divide": "nothing", "by_count": True},
    ),
}


def largest(vector, count):
    kept = np.zeros_like(vector)
    for place in sorted(range(len(vector)), key=lambda n: (-abs(vector[n]), n))[:count]:
        kept[place] = vector[place]
    return kept


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CONSENSUS)
def test_ties(name, density):
    consensus, form = CONSENSUS[name]

    def reference(values, start):
        vectors = np.array([largest(value - start, int(density * len(start))) for value in values])
        return start + 0.7 * elected(vectors, WEIGHTS, **form)

    found = F.ties(BASE, MODELS, density=density, weights=WEIGHTS, scale=0.7, consensus=consensus)
    assert_params(found, by_entry(MODELS, BASE, reference))


def test_the_two_forms_differ_by_weights_alone():
    peft, mergekit = (
        functools.partial(F.ties, BASE, MODELS, consensus=c) for c in (F.disjoint_mean, F.weighted_disjoint_mean)
    )
    assert_close(peft()["params"], mergekit()["params"])
    one, two = (flat(form(weights=[1, 2, 3])["params"])["head/kernel"] for form in (peft, mergekit))
    assert np.abs(one - two).max() > 0.01


def test_ties_of_the_whole_vector():
    vectors = np.array(
        [np.concatenate([v.reshape(-1) for v in flat(F.task_vector(m, BASE)["params"]).values()]) for m in MODELS]
    )
    kept = np.array([largest(v, int(0.2 * len(v))) for v in vectors.astype(np.float64)])
    expected = elected(kept, [1, 1, 1], weigh_votes=False, divide="count")
    found = F.task_vector(F.ties(BASE, MODELS, whole=True), BASE)["params"]
    np.testing.assert_allclose(np.concatenate([v.reshape(-1) for v in flat(found).values()]), expected, atol=1e-6)
    assert_close(F.ties(BASE, MODELS, whole=True, density=1), F.ties(BASE, MODELS, density=1))


def test_small_leaves_keep_some_entries():
    kept = F.ties(BASE, MODELS[:1], density=0.2, least=1)["params"]
    assert [int((kept["head"][name] != BASE["params"]["head"][name]).sum()) for name in ("bias", "kernel", "gain")] == [
        1,
        4,
        1,
    ]
    none = F.ties(BASE, MODELS[:1], density=0.2)["params"]
    np.testing.assert_array_equal(none["head"]["bias"], BASE["params"]["head"]["bias"])
    assert_close(F.ties(BASE, MODELS, density=0, least=1)["params"], BASE["params"])


def test_opposed_and_zero_vectors():
    base = {"w": np.zeros(4, np.float32)}
    models = [{"w": np.array([1, 0, -2, 1], np.float32)}, {"w": np.array([-1, 0, -4, 3], np.float32)}]
    np.testing.assert_allclose(F.ties(base, models, density=1)["w"], [1, 0, -3, 2])  # a tie is positive
    opposed = F.task_arithmetic(base, models, weights=[1, -1], consensus=F.weighted_mean)["w"]
    np.testing.assert_allclose(opposed, [2, 0, 2, -2])  # weights that sum to 0 divide by 1
    found = F.ties(base, models, density=1, weights=[1, -1], consensus=F.weighted_disjoint_mean)["w"]
    np.testing.assert_allclose(found, [2, 0, -4, 3])  # 1 + 1 by 0 is by 1; 4 / −1; −3 / −1
    np.testing.assert_array_equal(F.model_stock(base, [base, base])["w"], 0)
    against = F.model_stock(base, [{"w": np.ones(4, np.float32)}, {"w": -np.ones(4, np.float32)}])["w"]
    np.testing.assert_array_equal(against, 0)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.2), (0.9, 0.3), (0.95, 0.01), (1.0, 0.5), (0.0, 0.1)])
def test_breadcrumbs(density, gamma):
    def middle(vector):
        count, target, top = len(vector), int(density * len(vector)), int(gamma * len(vector))
        if density >= 1:
            return vector
        top = min(top, count - target)
        order = sorted(range(count), key=lambda n: (abs(vector[n]), n))
        kept = np.zeros_like(vector)
        for place in order[count - top - target : count - top]:
            kept[place] = vector[place]
        return kept

    def reference(values, start):
        return start + 0.5 * sum(w * middle(v - start) for w, v in zip(WEIGHTS, values, strict=True))

    found = F.breadcrumbs(BASE, MODELS, density=density, gamma=gamma, weights=WEIGHTS, scale=0.5)
    assert_params(found, by_entry(MODELS, BASE, reference))
    agreed = F.breadcrumbs(BASE, MODELS, density=density, gamma=gamma, consensus=F.weighted_disjoint_sum)
    form = CONSENSUS["mergekit, no normalize"][1]
    assert_params(
        agreed,
        by_entry(MODELS, BASE, lambda v, s: s + elected(np.array([middle(x - s) for x in v]), [1, 1, 1], **form)),
    )


BIG = {"w": np.zeros((40, 50, 30), np.float32), "b": np.zeros(3000, np.float32)}
TUNED = {name: np.random.default_rng(5).normal(size=leaf.shape).astype(np.float32) for name, leaf in BIG.items()}


def test_dare_drops_and_rescales():
    found = F.dare(BIG, [TUNED], key=jax.random.key(0), density=0.3)
    for name, vector in TUNED.items():
        kept = found[name] != 0
        assert np.mean(kept) == pytest.approx(0.3, abs=0.03)
        np.testing.assert_allclose(found[name][kept], vector[kept] / 0.3, rtol=1e-6)
    plain = F.dare(BIG, [TUNED], key=jax.random.key(0), density=0.3, rescale=F.unscaled)
    normed = F.dare(BIG, [TUNED], key=jax.random.key(0), density=0.3, rescale=F.by_norm)
    for name, vector in TUNED.items():
        np.testing.assert_allclose(plain[name], 0.3 * found[name], rtol=1e-5)
        assert np.abs(normed[name]).sum() == pytest.approx(np.abs(vector).sum(), rel=1e-5)
        ratio = np.abs(vector).sum(dtype=np.float64) / np.abs(plain[name]).sum(dtype=np.float64)
        np.testing.assert_allclose(normed[name], plain[name] * ratio, rtol=1e-5)
    assert_close(F.dare(BIG, [TUNED], key=0, density=1), TUNED)
    np.testing.assert_array_equal(F.dare(BIG, [BIG], key=0, rescale=F.by_norm)["w"], 0)


def test_dare_draws_by_key_by_model_and_by_path():
    def kept(**how):
        return F.dare(BIG, **{"models": [TUNED], "key": 1, **how})["b"] != 0

    first = kept()
    np.testing.assert_array_equal(first, kept())
    np.testing.assert_array_equal(kept(key=jax.random.key(7)), kept(key=jax.random.PRNGKey(7)))
    several = [
        kept(key=2),
        F.dare(BIG, [BIG, TUNED], key=1)["b"] != 0,
        F.dare({"c": BIG["b"]}, [{"c": TUNED["b"]}], key=1)["c"] != 0,
    ]
    for other in several:
        assert 0.4 < np.mean(first == other) < 0.6


@pytest.mark.parametrize("name", CONSENSUS)
def test_dare_elects(name):
    consensus, form = CONSENSUS[name]
    models = [TUNED, {name: -2 * leaf[::-1] for name, leaf in TUNED.items()}]
    alone = [
        F.dare(BIG, [model if n == m else BIG for m in range(2)], key=4, density=0.6, consensus=F.weighted_sum)["b"]
        for n, model in enumerate(models)
    ]
    found = F.dare(BIG, models, key=4, density=0.6, weights=[0.3, 0.9], consensus=consensus)["b"]
    np.testing.assert_allclose(found, elected(np.array(alone, np.float64), [0.3, 0.9], **form), atol=1e-6)


def test_della_keeps_the_large_oftener():
    found = F.della(BIG, [TUNED], key=0, density=0.5, epsilon=0.3, rescale=F.unscaled)
    for name, vector in TUNED.items():
        kept = (found[name] != 0).reshape(-1, vector.shape[-1])
        sizes = np.abs(vector).reshape(-1, vector.shape[-1])
        np.testing.assert_allclose(found[name][found[name] != 0], vector[found[name] != 0])
        assert kept.mean() == pytest.approx(0.5, abs=0.03)
        large = sizes > np.quantile(sizes, 0.9)
        assert kept[large].mean() == pytest.approx(0.5 + 0.3 * 0.9, abs=0.05)
        assert kept[sizes < np.quantile(sizes, 0.1)].mean() == pytest.approx(0.5 - 0.3 * 0.9, abs=0.05)


@pytest.mark.parametrize("axis", [-2, 0, 1, -1])
def test_della_ranks_along_an_axis(axis):
    seen = []

    def spy(vector, mask, probability):
        seen.append((vector, mask, np.broadcast_to(probability, vector.shape)))
        return F.by_probability(vector, mask, probability)

    model = {"w": np.random.default_rng(0).normal(size=(3, 5, 4)), "one": np.ones((1, 1)), "b": np.array([3.0, -9, 1])}
    base = jax.tree.map(np.zeros_like, model)
    found = F.della(base, [model], key=0, density=0.4, epsilon=0.1, axis=axis if axis != 0 else 0, rescale=spy)
    by_shape = {vector.shape: (vector, mask, chances) for vector, mask, chances in seen}
    np.testing.assert_allclose(by_shape[(3,)][2], [0.4, 0.5, 0.3])
    np.testing.assert_allclose(by_shape[(1, 1)][2], 0.4)
    vector, mask, chances = by_shape[(3, 5, 4)]
    for sizes, own in zip(np.moveaxis(np.abs(vector), axis, -1).reshape(-1, vector.shape[axis]),
                          np.moveaxis(chances, axis, -1).reshape(-1, vector.shape[axis]), strict=True):  # fmt: skip
        for size, chance in zip(sizes, own, strict=True):
            rank = sum(other < size for other in sizes)
            assert chance == pytest.approx(0.3 + 0.2 * rank / (len(sizes) - 1))
    np.testing.assert_allclose(found["w"], np.where(mask, vector / chances, 0))


def test_model_stock():
    def stock(values, start):
        away = [value - start for value in values]
        lengths = [np.sqrt(sum(a * a)) for a in away]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosine = sum(sum(away[i] * away[j]) / max(lengths[i] * lengths[j], 1e-6) for i, j in pairs) / 3
        ratio = 3 * cosine / (1 + 2 * cosine)
        return ratio * sum(values) / 3 + (1 - ratio) * start

    assert_params(F.model_stock(BASE, MODELS), by_entry(MODELS, BASE, stock), atol=2e-6)
    found = F.model_stock(BASE, MODELS, filters=-1)["params"]
    kernels = [m["params"]["head"]["kernel"].astype(np.float64) for m in (BASE, *MODELS)]
    for unit in range(3):
        expected = stock([kernel[:, unit] for kernel in kernels[1:]], kernels[0][:, unit])
        np.testing.assert_allclose(found["head"]["kernel"][:, unit], expected, atol=1e-5)
    turned = [jax.tree.map(lambda x: x.T, one["params"]) for one in (BASE, *MODELS)]  # PyTorch's order of axes
    other = F.model_stock(turned[0], turned[1:], filters=0)
    np.testing.assert_allclose(other["head"]["kernel"].T, found["head"]["kernel"], atol=1e-6)


def test_knots_is_task_arithmetic_where_all_stays():
    expected = F.task_arithmetic(BASE, MODELS, weights=WEIGHTS, scale=0.6)
    found = F.knots(BASE, MODELS, density=1, weights=WEIGHTS, scale=0.6, consensus=F.weighted_sum, tolerance=0)
    assert_close(found, expected)


def test_knots_merges_in_common_directions():
    rng = np.random.default_rng(1)
    base = {"kernel": rng.normal(size=(5, 4)).astype(np.float32)}
    models = [
        {"kernel": (base["kernel"] + np.outer(rng.normal(size=5), rng.normal(size=4))).astype(np.float32)}
        for _ in range(3)
    ]
    together = np.concatenate([(m["kernel"] - base["kernel"]).T.astype(np.float64) for m in models], axis=1)
    values, vectors = np.linalg.eigh(together @ together.T)  # left singular vectors, of rank 3
    outputs, sizes = vectors[:, ::-1][:, :3], np.sqrt(values[::-1][:3])
    inputs = np.diag(1 / sizes) @ outputs.T @ together
    parts = np.array([largest(inputs[:, 5 * n : 5 * n + 5].reshape(-1), 6) for n in range(3)])
    common = elected(parts, [1, 1, 1], weigh_votes=False, divide="count").reshape(3, 5)
    # the sign of a singular vector is free, and an election over a tie is not met here
    expected = base["kernel"] + (outputs @ np.diag(sizes) @ common).T
    np.testing.assert_allclose(F.knots(base, models, density=0.4)["kernel"], expected, atol=1e-5)


@pytest.mark.parametrize(("whole", "least", "by_count"), [(True, 0, False), (False, 0, False), (False, 2, True)])
def test_what_agrees_is_of_the_model_and_the_rest_of_the_base(whole, least, by_count):
    found = F.agreeing(BASE, MODELS, density=0.3, whole=whole, least=least, by_count=by_count)
    shapes, start = flat(BASE["params"]), flat(BASE["params"])
    moved = [{p: flat(model["params"])[p] - start[p] for p in shapes} for model in MODELS]
    for number, model in enumerate(MODELS):
        if whole:
            together = np.concatenate([moved[number][p].reshape(-1) for p in shapes])
            kept = largest(together, int(0.3 * len(together)))
            for path in shapes:
                size = shapes[path].size
                moved[number][path], kept = kept[:size].reshape(shapes[path].shape), kept[size:]
        else:
            for path in shapes:
                own = moved[number][path]
                count = max(int(0.3 * own.size), least)
                moved[number][path] = largest(own.reshape(-1), count).reshape(own.shape)
        assert_close(found[number]["batch_stats"], model["batch_stats"] | {"norm": {
            **model["batch_stats"]["norm"], "count": BASE["batch_stats"]["norm"]["count"],
        }}, atol=0)  # fmt: skip
    for path in shapes:
        for place in np.ndindex(shapes[path].shape):
            votes = [float(own[path][place]) for own in moved]
            sign = 1 if sum(np.sign(votes) if by_count else votes) >= 0 else -1
            for number, vote in enumerate(votes):
                entry = flat(found[number]["params"])[path][place]
                whose = MODELS[number] if vote * sign > 0 else BASE
                assert entry == flat(whose["params"])[path][place]


def test_agreeing_at_its_ends():
    assert_close(F.agreeing(BASE, MODELS[:1], density=1.0)[0]["params"], MODELS[0]["params"], atol=0)
    assert_close(F.agreeing(BASE, MODELS, density=0.0)[1]["params"], BASE["params"], atol=0)
    summed = F.task_arithmetic(BASE, F.agreeing(BASE, MODELS, density=0.4, whole=False))
    assert_close(summed["params"], F.ties(BASE, MODELS, density=0.4, consensus=F.weighted_disjoint_sum)["params"])
    with pytest.raises(jt.InputError, match="density must be in"):
        F.agreeing(BASE, MODELS, density=1.2)
    with pytest.raises(jt.InputError, match="model 1 differ"):
        F.agreeing(BASE, [BASE, {"params": {}}])
