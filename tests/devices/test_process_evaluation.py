"""Two processes evaluate and predict what one does: each example once, the files written once and in order."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import commands
from jobs import ended, start

import jaxtransfer as jt

TRAINED = ("pretrain", "simclr", "pcgrad")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of what one process made, and of what two made of the same runs; and what each of the two printed."""
    out = tmp_path_factory.mktemp("read")
    pictures = out / "one" / "pictures"
    pictures.mkdir(parents=True)
    for number, image in enumerate(jt.data.load("digits/upright", "test").read(np.arange(17))["image"]):
        assert cv2.imwrite(str(pictures / f"{number:02}.png"), image)
    (pictures / "03a.png").write_bytes(b"no image")  # of the first process, and the last file of the last batch
    (pictures / "99\udcff.png").write_bytes(b"none either")
    codes, told = ended(
        start(commands.__file__, out / "one", "alone", *TRAINED, *commands.READERS, count=1, devices=1), timeout=1800
    )
    assert codes == [2], told  # two pictures can't be read
    for name in (*TRAINED, "pictures"):
        shutil.copytree(out / "one" / name, out / "two" / name)
    jobs = start(commands.__file__, out / "two", *commands.READERS)
    printed = [job.communicate(timeout=1800) for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], printed
    return out / "one", out / "two", printed


def without_places(value, folder):
    return json.loads(json.dumps(value).replace(str(folder), ""))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in commands.READERS if name.startswith("evaluate")])
def test_scores_are_those_of_one_process(made, name):
    one, two, _ = made
    files = [file.relative_to(one / name) for file in sorted((one / name).rglob("*")) if file.is_file()]
    assert files == [file.relative_to(two / name) for file in sorted((two / name).rglob("*")) if file.is_file()]
    assert any(file.name == "evaluation.json" for file in files)
    for file in files:
        if file.suffix == ".csv" and file.name == "confusion.csv":
            assert (two / name / file).read_bytes() == (one / name / file).read_bytes()
        elif file.suffix == ".json":
            mine, theirs = (
                without_places(json.loads((folder / name / file).read_text()), folder) for folder in (one, two)
            )
            assert_close(mine, theirs, file)


def assert_close(mine, theirs, where):
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key, value in mine.items():
            assert_close(value, theirs[key], f"{where}: {key}")
    elif isinstance(mine, list):
        for one, other in zip(mine, theirs, strict=True):
            assert_close(one, other, where)
    else:
        assert theirs == (pytest.approx(mine, rel=1e-5, abs=1e-6) if isinstance(mine, float) else mine), where


@pytest.mark.slow
def test_one_process_prints_and_writes(made):
    one, two, ((out, err), (silent, also)) = made
    assert len([line for line in out.splitlines() if line.startswith("{")]) == 6  # a line of each data set, and predict
    assert [line for line in silent.splitlines() if not line.startswith("[Gloo]")] == []
    assert also == ""
    assert err.count("2 of 19 images could not be read") == 1
    lines = [json.loads(line) for line in (two / "predict.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (one / "predict.jsonl").read_text().splitlines()]
    assert [Path(line["image"]).name for line in lines] == sorted(path.name for path in (two / "pictures").iterdir())
    assert [number for number, line in enumerate(lines) if "error" in line] == [4, 18]
    for line, other in zip(lines, wanted, strict=True):
        assert_close(without_places(other, one), without_places(line, two), line["image"])
    assert not list(two.glob(".predict*"))
