import cv2
import numpy as np
import pytest

from jaxtransfer.cli import main
from jaxtransfer.version import VERSION


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The digits are prepared once, outside of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTRANSFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No data set of the user's is seen by a command; tests of other files may share the process."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture(scope="session")
def source(own_cache, tmp_path_factory):
    """A tiny pretrained run, shared; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "source"
    words = ("pretrain", "--data", "digits/upright", "--steps", "20", "--batch-size", "32", "--out", str(out))
    assert main(words) == 0
    return out


@pytest.fixture(autouse=True)
def curves_of_source_alone(undrawn):
    """Learning curves of a test's own runs are not drawn; those of `source` are."""


@pytest.fixture
def run(capsys):
    """Runs a command that succeeds; returns its lines on stdout and on stderr."""

    def go(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out.splitlines(), err.splitlines()

    return go


@pytest.fixture
def refused(capsys):
    """Runs a command that must end in exit code 2; returns its one line on stderr."""

    def go(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        begun = ("step ", f"jaxtransfer {VERSION}: ")  # a training says that it begins
        lines = [line for line in err.splitlines() if not line.lstrip().startswith(begun)]
        assert code == 2, (out, err)
        assert len(lines) == 1, err
        assert lines[0].startswith("jaxtransfer: error: ")
        assert "Traceback" not in err
        assert out == ""
        return lines[0].removeprefix("jaxtransfer: error: ")

    return go


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of images in class folders."""

    def make(name="images", *, classes=3, each=10, shape=(8, 8, 3)):
        rng = np.random.default_rng(classes)
        for label in range(classes):
            (tmp_path / name / f"class{label}").mkdir(parents=True)
            for number in range(each):
                image = rng.integers(0, 256, shape, dtype=np.uint8)
                assert cv2.imwrite(str(tmp_path / name / f"class{label}" / f"{number}.png"), image)
        return tmp_path / name

    return make
