"""Contrastive representation distillation against loops: losses, constants and memories of successive batches."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK

import jaxtransfer as jt

crd, crd_memory = jt.losses.crd, jt.losses.crd_memory
CRDMemory: Any = jt.losses.CRDMemory  # of NumPy arrays too
EXAMPLES, DIM, BATCH, DRAWS = 9, 4, 3, 5


def unit(vector):
    return vector / np.sqrt(sum(vector**2))


def contrast(anchors, memory, constant, index, negatives, temperature, eps):
    """[B] losses and Z, in the released order: exponentials, Z of the first batch, ratios, logarithms."""
    exponentials = []
    for x, own, others in zip(anchors, index, negatives, strict=True):
        exponentials.append([np.exp(unit(x) @ memory[i] / temperature) for i in (own, *others)])
    examples, draws = len(memory), len(negatives[0])
    constant = constant or np.mean(exponentials) * examples
    noise, losses = draws / examples, []
    for row in exponentials:
        right, *wrong = (e / constant for e in row)
        loss = -np.log(right / (right + noise + eps))
        losses.append(loss - sum(np.log(noise / (w + noise + eps)) for w in wrong))
    return np.array(losses), constant


def reference(student, teacher, memory, index, negatives, temperature=0.07, momentum=0.5, eps=1e-7):
    rows_s, rows_t, z_s, z_t = (np.array(part, np.float64) for part in memory)
    first, z_s = contrast(student, rows_t, z_s, index, negatives, temperature, eps)
    second, z_t = contrast(teacher, rows_s, z_t, index, negatives, temperature, eps)
    for i, s, t in zip(index, student, teacher, strict=True):
        rows_s[i] = unit(momentum * rows_s[i] + (1 - momentum) * unit(s))
        rows_t[i] = unit(momentum * rows_t[i] + (1 - momentum) * unit(t))
    return first + second, CRDMemory(rows_s, rows_t, z_s, z_t)


def draw(rng):
    return {
        "student": rng.normal(size=(BATCH, DIM)),
        "teacher": rng.exponential(size=(BATCH, DIM)),
        "index": rng.choice(EXAMPLES, BATCH, replace=False).astype(np.int32),
        "negatives": rng.integers(0, EXAMPLES, (BATCH, DRAWS)).astype(np.int32),
    }


@partial(jax.jit, compiler_options=QUICK)
def run(arrays, memory, options, weights):
    def total(pair):
        values, new = crd(**{**arrays, **pair}, memory=memory, **options)
        return jnp.sum(values * weights), (values, new)

    pair = {name: arrays[name] for name in ("student", "teacher")}
    (_, (values, new)), gradients = jax.value_and_grad(total, has_aux=True)(pair)
    return values, new, gradients


@cache
def drawn():
    return [np.asarray(part) for part in crd_memory(jax.random.key(3), 500, DIM)]


def fresh(dtype: type = np.float64):
    return CRDMemory(*(part[:EXAMPLES].astype(dtype) if part.ndim else part.astype(dtype) for part in drawn()))


OPTIONS = [(0.07, 0.5, 1e-7), (0.5, 0.9, 1e-3), (1.0, 0.0, 0.1)]


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "momentum", "eps"), OPTIONS)
def test_two_batches(rng, x64, temperature, momentum, eps):
    """The second has the constants of the first, and its rows; slopes are those of the reference."""
    options = {"temperature": temperature, "momentum": momentum, "eps": eps}
    ours = theirs = fresh()
    for turn in range(2):
        arrays, weights = draw(rng), rng.normal(size=BATCH)
        values, new, gradients = run(*jax.tree.map(jnp.asarray, (arrays, ours, options, weights)))
        expected, after = reference(**arrays, memory=theirs, **options)
        np.testing.assert_allclose(values, expected, rtol=1e-9)
        for one, other in zip(new, after, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
        direction, h = {k: rng.normal(size=(BATCH, DIM)) for k in gradients}, 1e-5
        fixed = theirs._replace(student_norm=after.student_norm, teacher_norm=after.teacher_norm)  # Z has no gradient

        def at(step, arrays=arrays, fixed=fixed, weights=weights, direction=direction):
            moved = arrays | {k: arrays[k] + step * direction[k] for k in direction}
            return weights @ reference(**moved, memory=fixed, **options)[0]

        slope = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
        np.testing.assert_allclose(sum((gradients[k] * direction[k]).sum() for k in direction), slope, rtol=1e-7)
        ours, theirs = new, after
        assert turn or float(new.student_norm) > 0


def test_defaults_and_types(rng):
    arrays, memory = draw(rng), fresh(np.float32)
    single = {k: jnp.float32(v) if v.dtype == np.float64 else jnp.asarray(v) for k, v in arrays.items()}
    values, new = jax.jit(crd)(**single, memory=memory)
    expected, after = reference(**arrays, memory=fresh())
    np.testing.assert_allclose(values, expected, rtol=2e-5)
    for one, other in zip(new, after, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    scaled, _ = jax.jit(crd)(**single | {"student": 7 * single["student"]}, memory=memory)
    np.testing.assert_allclose(scaled, values, rtol=1e-5)  # embeddings are normalised inside
    values, new = jax.eval_shape(crd, **single | {"student": single["student"].astype(jnp.bfloat16)}, memory=memory)
    assert values.dtype == new.student.dtype == new.student_norm.dtype == jnp.float32


def test_the_memory_is_drawn_uniformly():
    memory, bound = CRDMemory(*drawn()), 1 / np.sqrt(DIM / 3)
    assert memory.student.shape == memory.teacher.shape == (500, DIM)
    assert not np.any(np.asarray(memory.student) == np.asarray(memory.teacher))
    for rows in memory[:2]:
        extremes = np.array([np.min(rows), np.max(rows), np.mean(rows)])
        np.testing.assert_allclose(extremes, [-bound, bound, 0], atol=0.03)
        assert np.abs(rows).max() <= bound
    assert memory.student_norm == memory.teacher_norm == 0


def test_masks_and_degenerate_rows(rng):
    """One compiled function: masked rows of garbage, an empty first batch, zero embeddings, equal rows, tiny τ."""
    arrays, memory = draw(rng), jax.tree.map(jnp.asarray, fresh(np.float32))
    single = {k: jnp.float32(v) if v.dtype == np.float64 else jnp.asarray(v) for k, v in arrays.items()}
    options = {"temperature": jnp.float32(0.07), "mask": jnp.array([1.0, 0.0, 1.0])}
    weights, keep = jnp.ones(BATCH), np.array([0, 2])
    dirty = single | {k: single[k].at[1].set(jnp.nan) for k in ("student", "teacher")}
    dirty |= {"index": single["index"].at[1].set(-7), "negatives": single["negatives"].at[1].set(10**6)}
    values, new, gradients = run(dirty, memory, options, weights)
    expected, after = reference(**{k: v[keep] for k, v in arrays.items()}, memory=fresh())
    np.testing.assert_allclose(np.asarray(values)[keep], expected, rtol=2e-5)
    assert values[1] == 0
    for one, other in zip(new, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    for slopes in gradients.values():
        assert np.all(np.isfinite(slopes))
        np.testing.assert_array_equal(slopes[1], 0)

    values, new, gradients = run(dirty, memory, options | {"mask": jnp.zeros(BATCH)}, weights)
    for leaf in jax.tree.leaves((values, gradients)):
        np.testing.assert_array_equal(leaf, 0)
    for one, other in zip(new, memory, strict=True):
        np.testing.assert_array_equal(one, other)  # Z still waits for its first batch

    whole = options | {"mask": jnp.ones(BATCH)}
    zero = single | {"student": jnp.zeros((BATCH, DIM))}
    same = single | {"teacher": single["student"]}
    for case, temperature in ((zero, 0.07), (same, 0.07), (single, 1e-3), (single, 1e-4)):
        values, new, gradients = run(case, memory, whole | {"temperature": jnp.float32(temperature)}, weights)
        again = run(case, new, whole | {"temperature": jnp.float32(temperature)}, weights)
        for leaf in jax.tree.leaves((values, new, gradients, again)):
            assert np.all(np.isfinite(leaf)), (temperature, values, new)
        assert float(new.student_norm) > 0

    values, new, _ = run(single | {"index": single["index"].at[1].set(EXAMPLES)}, memory, whole, weights)
    assert np.isnan(values).tolist() == [False, True, False]
    assert np.all(np.isfinite(new.student))
    np.testing.assert_allclose(np.asarray(values)[keep], expected, rtol=2e-5)


def test_wrong_shapes_are_refused():
    x, memory = jnp.zeros((3, 4)), crd_memory(jax.random.key(0), 6, 4)
    index, negatives = jnp.zeros(3, jnp.int32), jnp.zeros((3, 2), jnp.int32)
    with pytest.raises(jt.InputError, match=r"embeddings \[batch, dim\] of one shape; got student \(3, 4\), teacher"):
        crd(x, x[:, :3], memory, index, negatives)
    with pytest.raises(jt.InputError, match=r"memory must be two arrays \[examples, 3\].*got \(6, 4\)"):
        crd(x[:, :3], x[:, :3], memory, index, negatives)
    for i, n in ((index[:2], negatives), (index, negatives[:2]), (index, negatives[:, :0]), (index, index)):
        with pytest.raises(jt.InputError, match=r"index must be \[batch\] and negatives"):
            crd(x, x, memory, i, n)
    with pytest.raises(jt.InputError, match="mask must have one entry per example"):
        crd(x, x, memory, index, negatives, mask=jnp.ones(2))
