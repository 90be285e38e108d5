"""Losses of feature maps against loops over examples, channels and positions, written channels first as in PyTorch."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import agree, finite, single

import jaxtransfer as jt

attention_transfer, fsp, hint, nst, review_kd, vid = (
    getattr(jt.losses, name) for name in ("attention_transfer", "fsp", "hint", "nst", "review_kd", "vid")
)


def channels_first(maps):
    return maps.transpose(0, 3, 1, 2)


def adaptive(maps, height, width):
    """`adaptive_avg_pool2d` of [B, C, H, W]."""
    _, _, rows, columns = maps.shape
    out = np.zeros((*maps.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = int(np.floor(i * rows / height)), int(np.ceil((i + 1) * rows / height))
            left, right = int(np.floor(j * columns / width)), int(np.ceil((j + 1) * columns / width))
            out[:, :, i, j] = maps[:, :, top:bottom, left:right].mean((2, 3))
    return out


def smaller(one, other):
    size = np.minimum(one.shape[2:], other.shape[2:])
    return adaptive(one, *size), adaptive(other, *size)


def unit(vector):
    return vector / max(np.sqrt(sum(vector**2)), 1e-12)


def hint_loop(student, teacher):
    return np.array([((s - t) ** 2).sum() / s.size for s, t in zip(student, teacher, strict=True)])


def attention_loop(student, teacher, p=2):
    values = []
    for pair in zip(*smaller(channels_first(student), channels_first(teacher)), strict=True):
        s, t = (unit(np.mean([np.abs(channel) ** p for channel in maps], axis=0).ravel()) for maps in pair)
        values.append(sum((s - t) ** 2) / len(s))
    return np.array(values)


def nst_loop(student, teacher, kernel=lambda x: x**2):
    values = []
    for pair in zip(*smaller(channels_first(student), channels_first(teacher)), strict=True):
        s, t = ([unit(channel.ravel()) for channel in maps] for maps in pair)
        mean = lambda a, b: sum(kernel(x @ y) for x in a for y in b) / len(a) / len(b)  # noqa: E731
        values.append(mean(t, t) + mean(s, s) - 2 * mean(s, t))
    return np.array(values)


def flow(below, above):
    below, above = smaller(channels_first(below), channels_first(above))
    out = np.zeros((len(below), below.shape[1], above.shape[1]))
    for b, i, j in np.ndindex(*out.shape):
        out[b, i, j] = (below[b, i] * above[b, j]).mean()
    return out


def fsp_loop(student, teacher):
    total = 0
    for k in range(len(student) - 1):
        total = total + ((flow(*student[k : k + 2]) - flow(*teacher[k : k + 2])) ** 2).mean((1, 2))
    return total


def vid_loop(student, teacher, scale, eps=1e-5):
    if student.ndim == 2:
        student, teacher = (x[:, None, None] for x in (student, teacher))
    student, teacher = smaller(channels_first(student), channels_first(teacher))
    values = np.zeros(len(student))
    for b, c in np.ndindex(*student.shape[:2]):
        variance = np.log(1 + np.exp(scale[c])) + eps
        likelihood = 0.5 * ((student[b, c] - teacher[b, c]) ** 2 / variance + np.log(variance))
        values[b] += likelihood.mean() / student.shape[1]
    return values


def review_loop(student, teacher):
    total = 0
    for s, t in zip(student, teacher, strict=True):
        s, t = (channels_first(x if x.ndim == 4 else x[:, None, None]) for x in (s, t))
        loss, weight, weights = ((s - t) ** 2).mean((1, 2, 3)), 1.0, 1.0
        for size in (4, 2, 1):
            if size >= s.shape[2]:
                continue
            weight /= 2
            loss = loss + weight * ((adaptive(s, size, size) - adaptive(t, size, size)) ** 2).mean((1, 2, 3))
            weights += weight
        total = total + loss / weights
    return total


@pytest.fixture
def maps(rng):
    """The student's are larger in height, the teacher's in width; sizes that do not divide, unequal channels."""
    return rng.normal(size=(3, 5, 3, 2)), 0.3 + rng.exponential(size=(3, 3, 4, 5))


@pytest.fixture
def same(rng):
    return rng.normal(size=(3, 5, 6, 2)), 0.3 + rng.exponential(size=(3, 5, 6, 2))


@pytest.fixture
def levels(rng):
    student = [rng.normal(size=(3, 5, 6, 2)), rng.normal(size=(3, 3, 7, 3)), rng.normal(size=(3, 3, 3, 4))]
    teacher = [rng.exponential(size=(3, 7, 3, 2)), rng.normal(size=(3, 4, 2, 3)), rng.normal(size=(3, 1, 2, 4))]
    return student, teacher


@pytest.fixture
def fused(rng):
    shapes = (3, 7, 6, 2), (3, 4, 5, 3), (3, 5)
    return [rng.normal(size=s) for s in shapes], [rng.exponential(size=s) for s in shapes]


def test_hint(rng, same):
    agree(hint, hint_loop, same, rng)
    agree(hint, hint_loop, [rng.normal(size=(4, 6)), rng.normal(size=(4, 6))], rng)


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_attention_transfer(rng, maps, p):
    agree(partial(attention_transfer, p=p), partial(attention_loop, p=p), maps, rng)


def offset_kernel(x):
    return (x + 0.5) ** 3


@pytest.mark.parametrize("kernel", [np.square, offset_kernel], ids=["square", "cubic"])
def test_nst(rng, maps, kernel):
    ours = nst if kernel is np.square else partial(nst, kernel=kernel)
    agree(ours, partial(nst_loop, kernel=kernel), maps, rng)


def test_fsp(rng, levels):
    agree(fsp, fsp_loop, levels, rng)


def scaled_vid(student, teacher, scale, eps=1e-5):
    return vid(student, teacher, scale=scale, eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 0.2])
def test_vid(rng, maps, eps):
    student = rng.normal(size=(3, 5, 3, 5))
    agree(scaled_vid, vid_loop, (student, maps[1], rng.normal(size=5)), rng, eps=eps)


def test_vid_of_features(rng):
    arrays = [rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=6)]
    agree(scaled_vid, vid_loop, arrays, rng)
    start = np.full(6, np.log(np.exp(5 - 1e-5) - 1))  # a variance of 5
    expected = ((arrays[0] - arrays[1]) ** 2 / 10 + np.log(5) / 2).mean(1)
    np.testing.assert_allclose(vid_loop(arrays[0], arrays[1], start), expected, rtol=1e-12)


def test_review_kd(rng, fused):
    agree(review_kd, review_loop, fused, rng)


@pytest.mark.slow
def test_defaults_in_single_precision(same, maps, levels, fused):
    pairs = {"same": same, "maps": maps, "levels": levels, "fused": fused}
    student, teacher = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    released = {"same": (hint, partial(vid, scale=jnp.linspace(-1, 4, 2))), "maps": (attention_transfer, nst)}
    released |= {"levels": (fsp,), "fused": (review_kd,)}
    loops = {"same": (hint_loop, partial(vid_loop, scale=np.linspace(-1, 4, 2))), "maps": (attention_loop, nst_loop)}
    loops |= {"levels": (fsp_loop,), "fused": (review_loop,)}

    def every(losses, stack, s, t):
        return stack([loss(s[name], t[name]) for name, group in losses.items() for loss in group])

    single(partial(every, released, jnp.stack), partial(every, loops, np.stack), [student, teacher])


@pytest.mark.slow
def test_degenerate_maps(rng):
    x, y = rng.normal(size=(2, 2, 3, 2, 3))
    zero, flat = np.zeros_like(x), np.full_like(x, 0.1)
    dead = x * [1.0, 0.0, 1.0]  # a channel that never fires
    cases = [(x, x), (zero, y), (x, zero), (zero, zero), (flat, y), (flat, flat), (dead, y), (dead, dead), (1e4 * x, y)]

    def losses(s, t):
        rows = [hint(s, t), nst(s, t), fsp([s, s], [t, t]), review_kd([s], [t]), vid(s, t, scale=jnp.zeros(3))]
        return *rows, *(attention_transfer(s, t, p=p) for p in (1, 2.5))

    found = finite(losses, cases)
    for case in (0, 3, 5, 7):
        for number in (0, 1, 2, 3, 5, 6):
            np.testing.assert_allclose(found[case][number], 0, atol=1e-7)
    one = nst(jnp.float32(x[:1]), jnp.float32(y[:1]))
    np.testing.assert_allclose(one, nst_loop(x[:1], y[:1]), rtol=1e-4)


def test_wrong_shapes_are_refused():
    maps, narrow, rows = jnp.zeros((2, 4, 3, 5)), jnp.zeros((2, 4, 3, 2)), jnp.zeros((2, 5))
    with pytest.raises(jt.InputError, match=r"of one shape; got student \(2, 4, 3, 5\), teacher \(2, 4, 3, 2\): proj"):
        hint(maps, narrow)
    for loss in (attention_transfer, nst):
        for wrong in (rows, maps[:1], maps[0]):
            with pytest.raises(
                jt.InputError, match=r"maps \[batch, height, width, channels\] of one batch; got student"
            ):
                loss(maps, wrong)
    for student, teacher in (([maps], [maps]), ([maps, maps], [maps]), ([], [])):
        with pytest.raises(jt.InputError, match=r"same number of maps, at least 2; got"):
            fsp(student, teacher)
    with pytest.raises(jt.InputError, match=r"of equal channels; got student .*: project the student by a 1x1"):
        fsp([maps, maps], [maps, narrow])
    with pytest.raises(jt.InputError, match=r"of equal channels; got student"):
        vid(narrow, maps, scale=jnp.zeros(2))
    with pytest.raises(jt.InputError, match=r"scale must have one entry per channel, \(5,\); got \(1,\)"):
        vid(maps, maps, scale=jnp.zeros(1))
    with pytest.raises(jt.InputError, match=r"features \[batch, channels\] of one shape"):
        vid(rows, rows[:, :4], scale=jnp.zeros(5))
    for student, teacher in (([], []), ([maps], [maps, maps])):
        with pytest.raises(jt.InputError, match=r"same number of maps, at least 1; got"):
            review_kd(student, teacher)
    with pytest.raises(jt.InputError, match=r"of one shape; got student"):
        review_kd([maps], [narrow])
