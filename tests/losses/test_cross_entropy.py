"""Cross-entropy and top-k against loops over single examples in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

cross_entropy = jax.jit(jt.losses.cross_entropy, static_argnames="label_smoothing")  # one program, not one an operation
top_k = jax.jit(jt.losses.top_k, static_argnames="k")


def softmax_loop(row):
    row = np.asarray(row, np.float64)
    weights = [np.exp(value - max(row)) for value in row]
    return np.array([weight / sum(weights) for weight in weights])


def reference(logits, targets, smoothing):
    """−Σ_c q_c log p_c, one example and one class at a time; 0 · log 0 is 0."""
    values = []
    for row, target in zip(np.asarray(logits, np.float64), targets, strict=True):
        classes = len(row)
        biggest = max(row)
        log_sum = np.log(sum(np.exp(value - biggest) for value in row))
        total = 0.0
        for c in range(classes):
            given = float(target == c) if np.ndim(target) == 0 else float(target[c])
            q = (1 - smoothing) * given + smoothing / classes
            total -= q * (row[c] - biggest - log_sum) if q else 0.0
        values.append(total)
    return np.array(values)


def soft_labels(rng, rows, classes):
    weights = rng.exponential(size=(rows, classes)) * (rng.random((rows, classes)) < 0.7)
    weights[:, 0] += 0.01
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (5, 3), (4, 11), (3, 1)])
@pytest.mark.parametrize("kind", ["int", "soft"])
def test_value(rng, rows, classes, kind, smoothing):
    logits = rng.normal(scale=3, size=(rows, classes)).astype(np.float32)
    labels = rng.integers(0, classes, rows) if kind == "int" else soft_labels(rng, rows, classes)
    values = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing)
    assert values.shape == (rows,)
    np.testing.assert_allclose(values, reference(logits, labels, smoothing), rtol=2e-5, atol=2e-6)


def test_one_hot_probabilities_equal_integers(rng):
    logits, labels = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 4, 6)
    hot = jnp.asarray(np.eye(4, dtype=np.float32)[labels])
    for smoothing in (0.0, 0.2):
        hard = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing)
        np.testing.assert_array_equal(hard, cross_entropy(jnp.asarray(logits), hot, label_smoothing=smoothing))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_labels_of_every_integer_type(rng, dtype):
    logits = rng.normal(size=(3, 300)).astype(np.float32)  # more classes than a uint8 counts
    labels = np.array([3, 44, 100])
    expected = reference(logits, labels, 0.0)
    for given in (labels.astype(dtype), jnp.asarray(labels.astype(dtype))):
        np.testing.assert_allclose(jt.losses.cross_entropy(jnp.asarray(logits), given), expected, rtol=1e-5)
    hit = logits.copy()
    hit[np.arange(3), labels] = 9
    np.testing.assert_array_equal(jt.losses.top_k(jnp.asarray(hit), labels.astype(dtype)), np.ones(3))
    np.testing.assert_array_equal(jt.losses.top_k(jnp.asarray(hit), labels.astype(dtype), k=5), np.ones(3))


@pytest.mark.parametrize(("given", "expected"), [("bfloat16", "float32"), ("float16", "float32"), ("float32",) * 2])
@pytest.mark.parametrize("kind", ["int", "soft"])
def test_type_of_the_result(rng, given, expected, kind):
    logits = jnp.asarray(rng.normal(scale=3, size=(5, 7)), given)
    labels = rng.integers(0, 7, 5) if kind == "int" else soft_labels(rng, 5, 7)
    values = cross_entropy(logits, jnp.asarray(labels))
    assert values.dtype == expected
    exact = reference(np.asarray(logits, np.float64), labels, 0.0)  # of the rounded logits
    np.testing.assert_allclose(values, exact, rtol=1e-5)
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.asarray(labels)).sum())(logits)
    assert gradient.dtype == given


def test_double_precision_stays(rng, x64):
    logits, labels = rng.normal(scale=3, size=(5, 7)), rng.integers(0, 7, 5)
    for target in (labels, soft_labels(rng, 5, 7)):
        for smoothing in (0.0, 0.3):
            values = cross_entropy(jnp.asarray(logits), jnp.asarray(target), label_smoothing=smoothing)
            assert values.dtype == jnp.float64
            np.testing.assert_allclose(values, reference(logits, target, smoothing), rtol=1e-13)


@pytest.mark.parametrize("size", [1e4, -1e4, 3e38])
def test_huge_logits(size):
    logits = np.array([[size, 0, 1], [0, size, size], [size, size, size], [-size, 0, size / 2]], np.float32)
    labels = np.array([0, 0, 1, 2])
    values = np.asarray(cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))
    np.testing.assert_allclose(values, reference(logits, labels, 0.0), rtol=1e-6, atol=1e-6)
    grads = jax.grad(lambda x: cross_entropy(x, jnp.asarray(labels)).sum())(jnp.asarray(logits))
    expected = np.array([softmax_loop(row) for row in logits]) - np.eye(3)[labels]
    np.testing.assert_allclose(grads, expected, atol=1e-6)


def test_a_class_that_is_ruled_out():
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [-jnp.inf, 2.0, -jnp.inf]])
    values = cross_entropy(logits, jnp.array([0, 1]))
    np.testing.assert_allclose(values, [np.log(1 + np.e), 0], rtol=1e-6)
    assert np.isposinf(cross_entropy(logits[:1], jnp.array([1]))[0])
    grads = jax.grad(lambda x: cross_entropy(x, jnp.array([0, 1])).sum())(logits)
    sigmoid = 1 / (1 + np.e)
    np.testing.assert_allclose(grads, [[sigmoid - 1, 0, 1 - sigmoid], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_a_label_out_of_range_is_nan_and_only_its_own_row(rng, label):
    logits = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    labels = jnp.array([1, label, 3])
    for smoothing in (0.0, 0.1):
        values = np.asarray(cross_entropy(logits, labels, label_smoothing=smoothing))
        assert np.isnan(values).tolist() == [False, True, False]
    mask = jnp.array([1.0, 0.0, 1.0])

    def masked(x):
        return jt.Context().mean(cross_entropy(x, labels), mask).value

    value, grads = jax.value_and_grad(masked)(logits)
    assert float(value) == pytest.approx(reference(logits[::2], [1, 3], 0.0).mean(), rel=1e-5)
    assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(grads[1], np.zeros(4))
    assert top_k(logits, labels)[1] == 0
    assert top_k(logits, labels, k=3)[1] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["int", "soft"])
def test_gradient_three_ways(rng, x64, kind, smoothing):
    logits = rng.normal(scale=2, size=(4, 5))
    labels = rng.integers(0, 5, 4) if kind == "int" else soft_labels(rng, 4, 5).astype(np.float64)
    weights = rng.normal(size=4)  # a loss that tells rows apart

    def loss(x):
        return (weights * cross_entropy(x, jnp.asarray(labels), label_smoothing=smoothing)).sum()

    autodiff = np.asarray(jax.grad(loss)(jnp.asarray(logits)))
    target = np.eye(5)[labels] if kind == "int" else labels / labels.sum(1, keepdims=True)
    target = (1 - smoothing) * target + smoothing / 5
    formula = np.array([w * (softmax_loop(row) - q) for w, row, q in zip(weights, logits, target, strict=True)])
    np.testing.assert_allclose(autodiff, formula, rtol=1e-6, atol=1e-7)
    for _ in range(3):
        direction, step = rng.normal(size=logits.shape), 1e-5
        both = [float(loss(jnp.asarray(logits + s * step * direction))) for s in (1, -1)]
        assert (both[0] - both[1]) / (2 * step) == pytest.approx((autodiff * direction).sum(), rel=1e-7)


def test_wrong_shapes_are_refused(rng):
    logits = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    for labels in (jnp.zeros((4, 3), jnp.int32), jnp.zeros(3, jnp.int32), jnp.zeros(4), jnp.zeros((4, 2))):
        for loss in (jt.losses.cross_entropy, jt.losses.top_k):
            with pytest.raises(jt.InputError, match=r"expected \(4.*got"):
                loss(logits, labels)
    for wrong in (jnp.zeros(4), jnp.zeros((4, 3, 1))):
        with pytest.raises(jt.InputError, match=r"logits must be \[batch, classes\]"):
            jt.losses.cross_entropy(wrong, jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k(rng, k):
    logits, labels = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 5, 40)
    logits[::4] = np.round(logits[::4])  # ties
    expected = []
    for row, label in zip(logits, labels, strict=True):
        better = sum(value > row[label] or (value == row[label] and c < label) for c, value in enumerate(row))
        expected.append(float(better < k))
    scores = top_k(jnp.asarray(logits), jnp.asarray(labels), k=k)
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, expected)
    soft = 0.6 * np.eye(5, dtype=np.float32)[labels] + 0.08
    np.testing.assert_array_equal(top_k(jnp.asarray(logits), jnp.asarray(soft), k=k), expected)


def test_top_k_counts_a_number_that_is_none_before_the_true_class_and_gathers_no_rows(mesh_of):
    logits = np.float32([[3, np.nan, 2], [np.nan, 1, 0], [1, -np.inf, -np.inf], [5, 1, 1]])
    labels = np.int32([0, 0, 2, 2])
    for k, expected in ((1, [0, 0, 0, 0]), (2, [1, 0, 0, 0]), (3, [1, 0, 1, 1])):
        np.testing.assert_array_equal(top_k(logits, labels, k=k), expected)
    rows = jax.sharding.NamedSharding(mesh_of(4), jax.sharding.PartitionSpec("data"))
    program = jax.jit(lambda *of: jt.losses.top_k(*of, k=2), in_shardings=(rows, rows)).lower(logits, labels)
    assert "all-gather" not in program.compile().as_text()
