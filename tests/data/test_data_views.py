"""Augmentation on the device: what each transform may do to an image, and keys by example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.data import views

KEYS = jax.random.split(jax.random.key(0), 200)


def of(transform, image, keys=KEYS):
    return np.asarray(jax.jit(jax.vmap(transform, (0, None)))(keys, jnp.asarray(image, jnp.float32)))


@pytest.fixture
def image(rng):
    return (0.3 + 0.4 * rng.random((9, 7, 3))).astype(np.float32)


def grey(image):
    return image @ np.array([0.299, 0.587, 0.114])


def test_a_crop_of_a_ramp_is_a_ramp():
    rows, columns = np.mgrid[0:40, 0:60]
    ramp = np.stack([rows / 40, columns / 60, np.full((40, 60), 0.5)], -1).astype(np.float32)
    out = of(views.random_resized_crop(20, scale=(0.2, 0.6), ratio=(0.5, 2.0)), ramp)
    assert out.shape == (200, 20, 20, 3)
    np.testing.assert_allclose(out[..., 2], 0.5, atol=1e-5)
    inner = out[:, 4:16, 4:16]
    down, across = np.diff(inner[..., 0], axis=1), np.diff(inner[..., 1], axis=2)
    np.testing.assert_allclose(down, down.mean((1, 2), keepdims=True) + 0 * down, atol=8e-3)  # weights of whole pixels
    np.testing.assert_allclose(np.diff(inner[..., 0], axis=2), 0, atol=1e-5)
    height, width = 20 * 40 * down.mean((1, 2)), 20 * 60 * across.mean((1, 2))
    share, ratio = height * width / (40 * 60), width / height
    assert 0.19 < share.min() < 0.25
    assert 0.5 < share.max() < 0.61
    assert 0.48 < ratio.min() < 0.65
    assert 1.6 < ratio.max() < 2.05


def test_the_whole_image_is_a_crop_too(image):
    whole = of(views.random_resized_crop(scale=(1.0, 1.0), ratio=(1.0, 1.0)), image[:7])
    np.testing.assert_allclose(whole[0], image[:7], atol=1e-5)


def test_padded_crops_are_windows(image):
    out = of(views.random_crop(2), image)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = np.stack([padded[y : y + 9, x : x + 7] for y in range(5) for x in range(5)])
    which = [np.flatnonzero((windows == one).all((1, 2, 3)))[0] for one in out]
    assert len(set(which)) == 25


def test_flips_are_half(image):
    out = of(views.random_flip(), image)
    mirrored = np.array([np.array_equal(one, image[:, ::-1]) for one in out])
    assert all(np.array_equal(one, image) for one in out[~mirrored])
    assert 75 < mirrored.sum() < 125


@pytest.mark.slow
def test_each_colour_step_alone(image):
    bright = of(views.color_jitter(0.3, 0, 0, 0), image)
    factors = (bright / image[None]).reshape(200, -1)
    np.testing.assert_allclose(factors, factors[:, :1] + 0 * factors, rtol=1e-4)
    assert 0.7 <= factors.min() < 0.75
    assert 1.25 < factors.max() <= 1.3001
    contrast = of(views.color_jitter(0, 0.3, 0, 0), image)
    np.testing.assert_allclose(grey(contrast).mean((1, 2)), grey(image).mean(), atol=1e-5)
    away = (contrast - grey(image).mean()) / (image - grey(image).mean())[None]
    away = away.reshape(200, -1)
    np.testing.assert_allclose(away, np.median(away, 1, keepdims=True) + 0 * away, rtol=1e-2)
    saturated = of(views.color_jitter(0, 0, 0.3, 0), image)
    np.testing.assert_allclose(grey(saturated), grey(image)[None] + 0 * grey(saturated), atol=1e-5)
    assert len(np.unique(saturated[:, 0, 0, 0].round(4))) > 50
    turned = of(views.color_jitter(0, 0, 0, 0.1), image)
    np.testing.assert_allclose(grey(turned), grey(image)[None] + 0 * grey(turned), atol=2e-3)
    assert np.abs(turned - image[None]).max() > 0.02
    flat = of(views.color_jitter(0, 0, 0, 0.5), np.full((2, 2, 3), 0.4))
    np.testing.assert_allclose(flat, 0.4, atol=1e-3)  # grey has no hue


@pytest.mark.slow
def test_colours_in_random_order_stay_in_range(image):
    out = of(views.color_jitter(0.8, 0.8, 0.8, 0.2), image)
    assert out.min() >= 0
    assert out.max() <= 1
    assert len(np.unique(out[:, 0, 0, 0])) > 150
    one = of(views.color_jitter(0.4, 0.4, 0.4, 0.1), image[..., :1])
    assert one.shape == (200, 9, 7, 1)


def test_the_hue_turns_by_up_to_a_share_of_the_circle():
    patch = np.full((2, 2, 3), [0.6, 0.45, 0.4], np.float32)  # far from the clipping
    to_plane = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # I and Q of YIQ
    turned, own = of(views.color_jitter(0, 0, 0, hue=0.1), patch)[:, 0, 0] @ to_plane.T, to_plane @ patch[0, 0]
    angles = np.angle((turned[:, 0] + 1j * turned[:, 1]) / (own[0] + 1j * own[1]), deg=True)
    assert -36.01 < angles.min() < -33
    assert 33 < angles.max() < 36.01
    np.testing.assert_allclose(angles.std(), 36 / np.sqrt(3), rtol=0.1)


@pytest.mark.slow
def test_simclr_changes_and_greys_as_often_as_the_paper():
    patch = np.full((2, 2, 3), [0.6, 0.45, 0.4], np.float32)  # which crops and flips leave as it is
    out = of(views.simclr(), patch, jax.random.split(jax.random.key(1), 2000))[:, 0, 0]
    is_grey, untouched = np.ptp(out, axis=1) < 1e-6, np.abs(out - patch[0, 0]).max(1) < 1e-6
    assert abs(is_grey.mean() - 0.2) < 0.03
    assert abs(untouched.mean() - 0.2 * 0.8) < 0.03
    np.testing.assert_allclose(of(views.simclr(strength=0), patch), patch[None].repeat(200, 0), atol=1e-6)


def test_grey_solarised_and_blurred(image):
    np.testing.assert_allclose(of(views.greyscale(), image)[0], np.repeat(grey(image)[..., None], 3, -1), rtol=1e-5)
    expected = np.where(image >= 0.5, 1 - image, image)
    np.testing.assert_allclose(of(views.solarize(), image)[0], expected, rtol=1e-6)
    blurred = of(views.gaussian_blur((1.5, 1.5)), np.eye(31)[15][:, None, None] * np.eye(31)[15][None, :, None])[0]
    places = np.arange(31) - 15
    bell = np.exp(-(places**2) / (2 * 1.5**2))
    np.testing.assert_allclose(blurred[..., 0], np.outer(bell, bell) / bell.sum() ** 2, atol=1e-6)
    np.testing.assert_allclose(of(views.gaussian_blur(), np.full((5, 6, 3), 0.7)), 0.7, rtol=1e-5)


@pytest.mark.slow
def test_an_example_draws_by_its_number(rng):
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    transform = jax.jit(views.two_views(views.simclr()))
    key, rows = jax.random.key(1), jnp.arange(6)
    batch = {"image": images, "label": np.arange(6)}
    both = transform(key, batch, rows)
    assert set(both) == {"image", "image2", "label"}
    assert both["image"].dtype == jnp.float32
    assert np.abs(np.asarray(both["image"] - both["image2"])).mean() > 0.01
    order = np.array([3, 1, 5])
    some = transform(key, {k: v[order] for k, v in batch.items()}, rows[order])
    for name in ("image", "image2"):
        np.testing.assert_allclose(some[name], both[name][order], atol=1e-6)
    other = transform(jax.random.key(2), batch, rows)
    assert np.abs(np.asarray(other["image"] - both["image"])).mean() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_the_step_makes_the_same_views_on_any_devices(rng, mode):
    model = jt.models.with_heads(jt.models.mlp(4, hidden=(12,)), projection=jt.models.head(8, 5, batch_norm=False))
    objective, optimizer = jt.simclr(model), optax.sgd(0.1)
    batch = {"image": rng.integers(0, 256, (8, 6, 6, 1), dtype=np.uint8)}
    transform = views.two_views(views.chain(views.random_crop(1), views.random_flip()))
    seen = transform(jax.random.key(0), batch, jnp.arange(8))
    ends = []
    for mesh in (None, jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])):
        step = jt.train_step(objective, optimizer, mesh=mesh, mode=mode if mesh else "jit", transform=transform)
        state = jt.init(objective, optimizer, jax.random.key(5), seen)
        for _ in range(2):
            state, metrics = step(state, batch)
        ends.append((metrics["loss"], state.params))
    for one, two in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_fit_takes_a_transform(rng):
    model = jt.models.with_heads(jt.models.mlp(4, hidden=(12,)), projection=jt.models.head(5))
    batch = {"image": rng.integers(0, 256, (8, 6, 6, 1), dtype=np.uint8)}
    transform = views.two_views(views.random_crop(1))
    arguments = {"steps": 3, "transform": transform, "progress": False}
    one = jt.fit(jt.simclr(model), optax.sgd(0.1), [batch] * 3, **arguments)
    two = jt.fit(jt.simclr(model), optax.sgd(0.1), batch, sample=lambda key, data: data, **arguments)
    for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(two.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_refusals():
    for build in (
        lambda: views.random_resized_crop(scale=(0.5, 0.2)),
        lambda: views.random_resized_crop(ratio=(0.0, 1.0)),
        lambda: views.random_crop(0),
        lambda: views.color_jitter(-0.1),
        lambda: views.color_jitter(hue=0.6),
        lambda: views.gaussian_blur((0.0, 1.0)),
        lambda: views.sometimes(1.5, views.greyscale()),
    ):
        with pytest.raises(jt.InputError, match=r"expected|probability|padding"):
            build()
    with pytest.raises(jt.InputError, match=r"expected images \[B, H, W, C\] in batch\['image'\]; got shape \(4, 3\)"):
        views.two_views(views.greyscale())(jax.random.key(0), {"image": np.zeros((4, 3))}, jnp.arange(4))
    with pytest.raises(jt.InputError, match=r"uint8, or floating in \[0, 1\], in batch\['image'\]; got int32"):
        views.two_views(views.greyscale())(
            jax.random.key(0), {"image": np.zeros((4, 2, 2, 3), np.int32)}, jnp.arange(4)
        )
