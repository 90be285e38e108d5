"""Sentiment across domains, on made-up reviews: words of praise and blame that all domains share, and their own."""

import json

import numpy as np
import pytest
import scipy.sparse

import jaxtransfer as jt
from experiments import sentiment_domains
from experiments.sentiment_domains import DOMAINS, Experiment, Reviews

WORDS = 60


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Counts of 60 words: ten for praise, ten for blame, of which a domain hardly uses some; the rest say nothing."""
    rng, arrays = np.random.default_rng(0), {}
    for number, domain in enumerate(DOMAINS):
        liked = np.roll([0.5] * 6 + [0.05] * 4, 2 * number)
        for part, count in (("train", 80), ("test", 120)):
            y = np.arange(count) % 2
            rates = np.full((count, WORDS), 0.15)
            rates[:, :10] = np.where(y[:, None] == 1, liked, 0.1)
            rates[:, 10:20] = np.where(y[:, None] == 0, liked, 0.1)
            rows = scipy.sparse.csr_matrix(rng.poisson(rates))
            for kind in ("data", "indices", "indptr"):
                arrays[f"{domain}_{part}_{kind}"] = getattr(rows, kind)
            arrays[f"{domain}_{part}_y"] = y
    path = tmp_path_factory.mktemp("reviews") / "bow.npz"
    np.savez(path, **arrays)
    return path


def test_rows_are_of_length_one_and_know_no_labels(file):
    reviews = Reviews(Experiment(file=file, directions=12))
    pair = reviews.pair("dvd", "books")
    assert [rows.shape for rows in pair.rows] == [(80, 12), (80, 12), (120, 12)]
    for rows in pair.rows:
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert pair.words[0].max() == 1
    for key in reviews.labels:
        reviews.labels[key] = 1 - reviews.labels[key]
    again = Reviews(Experiment(file=file, directions=12)).pair("dvd", "books")
    np.testing.assert_array_equal(again.rows[1], pair.rows[1])
    assert pair.score(pair.labels[1]) == 100


@pytest.mark.slow
def test_it_runs_and_goes_on(file, tmp_path, capsys):
    small = {"file": file, "out": tmp_path, "directions": 12, "rounds": 2, "steps": 20, "linear_steps": 40}
    results = sentiment_domains.main(Experiment(**small))
    means = {method: np.mean([one["0"] for one in cells.values()]) for method, cells in results.items()}
    assert set(means) == set(sentiment_domains.METHODS)
    assert all(mean > 60 for mean in means.values()), means
    assert means["self-training"] > means["source only"] - 3
    assert "self-training: " in capsys.readouterr().err
    assert "| mcc |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    assert sentiment_domains.main(Experiment(**small)) == results
    with pytest.raises(jt.InputError, match="other settings"):
        sentiment_domains.main(Experiment(**{**small, "rounds": 3}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"methods": ("x",)}, "unknown method"), ({"rounds": 0}, "--rounds"), ({}, "no such file: nowhere.npz; give")],
)
def test_refusals(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jt.InputError, match=message):
        sentiment_domains.main(Experiment(**{"file": sentiment_domains.Path("nowhere.npz"), **changes}))
