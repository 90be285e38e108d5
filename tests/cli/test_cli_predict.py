"""`predict`: lists in, JSON lines, CSV or Parquet out, in the order of the files; features; what can't be read."""

import csv
import io
import json
import os
import sys

import cv2
import jax
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main


@pytest.fixture
def pictures(tmp_path):
    """Five digits, one of them twice in the list, a file that is no image and one that is missing."""
    test = jt.data.load("digits/upright", "test").take(5)
    for number, image in enumerate(test.read(np.arange(5))["image"]):
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    (tmp_path / "cut.png").write_bytes(b"no image")
    names = ["3.png", "0.png", "cut.png", "3.png", "gone.png", "1.png", "4.png", "2.png"]
    (tmp_path / "list.txt").write_text("\n".join(str(tmp_path / name) for name in names) + "\r\n\n")
    return tmp_path, names


def predicted(capsys, *words):
    """Runs the command, some of whose files can't be read; its lines on stdout and on stderr."""
    assert main(["predict", *map(str, words), "--batch-size", "3"]) == 2
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_every_form_says_the_same(source, pictures, capsys, monkeypatch):
    folder, names = pictures
    lines, err = predicted(capsys, source, "--list", folder / "list.txt", "--top", "2")
    lines = [json.loads(line) for line in lines]
    assert [os.path.basename(line["image"]) for line in lines] == names
    assert [number for number, line in enumerate(lines) if "error" in line] == [2, 4]
    assert lines[0]["top"] == lines[3]["top"]
    assert err == [err[-1]]
    assert "2 of 8 images could not be read" in err[-1]
    trained = jt.load_run(source)
    images = jt.data.load("digits/upright", "test").take(5).read(np.arange(5))["image"]
    logits = jax.jit(lambda v, x: trained.model.apply(v, x, train=False, key=None)[0]["logits"])(
        trained.variables, images
    )
    probabilities = np.asarray(jax.nn.softmax(logits))
    for line in (lines[0], lines[5]):
        row = probabilities[int(os.path.basename(line["image"])[0])]
        assert [trained.class_names.index(one["class"]) for one in line["top"]] == list(np.argsort(-row)[:2])
        np.testing.assert_allclose([one["probability"] for one in line["top"]], np.sort(row)[:-3:-1], atol=1e-6)

    for kind in ("jsonl", "csv", "parquet"):
        out = folder / f"out.{kind}"
        out.write_text("what was there before")
        words = (source, "--list", folder / "list.txt", "--top", "2", "--out", out)
        told, err = predicted(capsys, *words)
        assert json.loads(told[0]) == {"out": str(out), "images": 8, "unreadable": 2}
        assert [line.split(": ")[0] for line in err[:2]] == [lines[2]["image"], lines[4]["image"]]
        if kind == "jsonl":
            assert [json.loads(line) for line in out.read_text().splitlines()] == lines
            continue
        if kind == "csv":
            rows = list(csv.DictReader(io.StringIO(out.read_text())))
        else:
            import pandas

            rows = pandas.read_parquet(out).astype(object).where(lambda frame: frame.notna(), "").to_dict("records")
        assert list(rows[0]) == ["image", "class", "probability", "class_2", "probability_2", "error"]
        for row, line in zip(rows, lines, strict=True):
            assert row["image"] == line["image"]
            assert row["error"] == line.get("error", "")
            assert row["class"] == line.get("class", "")
            if "top" in line:
                assert row["class_2"] == line["top"][1]["class"]
                assert float(row["probability_2"]) == line["top"][1]["probability"]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "list.txt").read_bytes())))
    piped, _ = predicted(capsys, source, folder / "1.png", "--list", "-", "--top", "2")
    assert [json.loads(line) for line in piped] == [lines[5], *lines]
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_features(run, source, pictures):
    folder, _ = pictures
    words = ("predict", source, folder / "2.png", folder / "4.png", "--features")
    lines = [json.loads(line) for line in run(*words)[0]]
    trained = jt.load_run(source)
    images = jt.data.load("digits/upright", "test").take(5).read(np.array([2, 4]))["image"]
    embedded = jt.representation.embed(trained.model, trained.variables, [{"image": images}])
    np.testing.assert_allclose([line["features"] for line in lines], embedded.features, rtol=1e-5, atol=1e-6)
    assert len(lines[0]["top"]) == 3
    import pyarrow.parquet

    run(*words, "--out", folder / "features.parquet")
    table = pyarrow.parquet.read_table(folder / "features.parquet").to_pylist()
    np.testing.assert_allclose([row["features"] for row in table], embedded.features, rtol=1e-5, atol=1e-6)


def test_what_is_refused(refused, source, pictures, monkeypatch):
    folder, _ = pictures
    photo = folder / "1.png"
    assert "ends in .jsonl, .csv or .parquet" in refused("predict", source, photo, "--out", folder / "out.xlsx")
    assert "there is no folder" in refused("predict", source, photo, "--out", folder / "none" / "out.csv")
    features = ("--features", "--out", folder / "out.csv")
    assert "which CSV has no place for" in refused("predict", source, photo, *features)
    assert "cannot read" in refused("predict", source, "--list", folder / "none.txt")
    (folder / "empty.txt").write_text("\n\n")
    assert "names no file" in refused("predict", source, "--list", folder / "empty.txt")
    assert "is no text file" in refused("predict", source, "--list", _binary(folder))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'jaxtransfer[tables]'" in refused("predict", source, photo, "--out", folder / "out.parquet")
    broken = jt.load_run(source)
    broken = broken._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, broken.params))
    monkeypatch.setattr("jaxtransfer.cli.predict.load_run", lambda directory, **_: broken)
    assert "is not finite" in refused("predict", source, photo)
    assert "is not finite" in refused("predict", source, photo, "--out", folder / "out.csv")
    assert not (folder / "out.csv").exists()


def _binary(folder):
    (folder / "binary").write_bytes(b"\0\1\2")
    return folder / "binary"
