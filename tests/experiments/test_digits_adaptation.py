"""Digits across domains: what is drawn, framed and concluded, and the whole in its tiny form."""

import json

import jax
import numpy as np
import pytest

import jaxtransfer as jt
from experiments import digits_adaptation
from experiments.digits_adaptation import Experiment, drawing, framed, moved, reached, selection_of, spearman, table_of

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_it_runs_and_resumes(tmp_path):
    tiny = Experiment(out=tmp_path, tiny=True, seeds=1, batch_size=4, methods=("source only", "dann"))
    results = digits_adaptation.main(tiny)
    assert set(results) == set(digits_adaptation.DIRECTIONS)
    for by_method in results.values():
        for by_seed in by_method.values():
            assert 0 <= by_seed["0"]["accuracy"] <= 100
            assert all(np.isfinite(value) for value in by_seed["0"]["scores"].values())
    assert "| dann |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "accuracy.png").stat().st_size > 0
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    assert digits_adaptation.main(tiny) == results


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in digits_adaptation.METHODS if m not in ("source only", "dann")])
def test_methods_run(tmp_path, method):
    tiny = Experiment(out=tmp_path, tiny=True, seeds=1, batch_size=4, methods=(method,), directions=("mnist-usps",))
    (by_method,) = digits_adaptation.main(tiny).values()
    assert 0 <= by_method[method]["0"]["accuracy"] <= 100


def test_what_is_moved_by_nothing_is_as_it_was(rng):
    images = rng.integers(0, 256, (3, 6, 5, 1), np.uint8)
    still = jax.jit(moved, static_argnums=(2, 3, 4))(jax.random.key(0), images, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(still, images / 255, atol=1e-6)


def test_views_are_those_of_their_draws(rng):
    """Each against a loop over pixels, with the draws read off by moving ramps."""
    images = rng.integers(0, 256, (4, 9, 8, 1), np.uint8)
    key, amounts = jax.random.key(3), (0.3, 1.5, 0.4)
    seen = np.asarray(jax.jit(moved, static_argnums=(2, 3, 4))(key, images, *amounts))[..., 0]
    scales, shifts, slants = jax.random.split(key, 3)
    scale = np.exp(np.asarray(jax.random.uniform(scales, (4, 2), minval=-0.3, maxval=0.3)))
    by = np.asarray(jax.random.uniform(shifts, (4, 2), minval=-1.5, maxval=1.5))
    slope = np.asarray(jax.random.uniform(slants, (4, 1, 1), minval=-0.4, maxval=0.4)).ravel()

    def linear(line, place):
        low = int(np.floor(place))
        ends = [line[i] if 0 <= i < len(line) else 0 for i in (low, low + 1)]
        return ends[0] * (low + 1 - place) + ends[1] * (place - low)

    for n, image in enumerate(images[..., 0] / 255):
        places = [(i - 4) * scale[n, 0] + by[n, 0] + 4 for i in range(9)]
        rows = np.stack([[linear(column, place) for column in image.T] for place in places])
        for i in range(9):
            for j in range(8):
                place = (j - 3.5) * scale[n, 1] + by[n, 1] + slope[n] * (i - 4) + 3.5
                assert seen[n, i, j] == pytest.approx(linear(rows[i], place), abs=2e-5)


def test_each_domain_is_drawn_by_itself():
    data = {
        "source": {"image": np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), "label": np.arange(40)},
        "target": {"image": np.arange(100, 130, dtype=np.uint8).reshape(30, 1, 1, 1)},
    }
    batch = drawing(6, 0.0, 0.0, 0.0)(jax.random.key(0), jax.tree.map(jax.numpy.asarray, data))
    assert set(batch["target"]) == {"image"}  # no labels of the target are at hand
    np.testing.assert_array_equal(batch["source"]["image"].ravel(), batch["source"]["label"])
    assert np.all(np.asarray(batch["target"]["image"]) >= 100)


def test_the_frame_is_that_of_mnist():
    image = np.zeros((2, 16, 16, 1), np.uint8)
    image[0, :, 4:7], image[1, 2:, 7:13] = 200, 90
    out = framed(image)
    assert out.shape == (2, 28, 28, 1)
    for one in out[..., 0].astype(float):
        lit = np.flatnonzero(one.sum(1))
        assert lit[-1] - lit[0] + 1 <= 20
        for axis in (0, 1):
            middle = (one.sum(axis) * np.arange(28)).sum() / one.sum()
            assert abs(middle - 13.5) <= 0.6  # whole pixels


def test_conclusions():
    scores = [{"entropy": -1.0, "constant": 1.0}, {"entropy": -0.5, "constant": 1.0}]

    def cells(*values):
        return {str(i): {"accuracy": v, "scores": scores[i]} for i, v in enumerate(values)}

    results = {
        "mnist-usps": {"dann": cells(90.0, 92.0), "cdan": cells(80.0, 99.0)},
        "usps-mnist": {"dann": cells(95.0, 94.0), "cdan": cells(98.0, 98.0)},
    }
    assert reached(results) == {"dann": True, "cdan": False}
    header, rows = table_of(results)
    assert rows[0][1:5] == ["91.00", "90.0 92.0", "-1.0", "91.7"]
    assert len(header) == len(rows[0]) == 9
    _, rows = selection_of(results)
    assert [row[0] for row in rows] == ["entropy", "constant"]
    assert rows[0][1:4] == ["0.89", "92.00", "99.00"]
    assert rows[1][1] == "nan"


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert spearman([4, 3, 2, 1], [1, 2, 3, 4]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"methods": ("dan n",)}, "unknown method"), ({"directions": ("a-b",)}, "direction"), ({"seeds": 0}, "--seeds")],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(jt.InputError, match=message):
        digits_adaptation.main(Experiment(**{"out": tmp_path / "out", "tiny": True, **changes}))
    assert not (tmp_path / "out").exists()
