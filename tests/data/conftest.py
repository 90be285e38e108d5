import numpy as np
import pytest

from jaxtransfer.data import Dataset


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The digits are prepared once per test run, outside of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTRANSFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def numbered():
    """Makes a data set whose example i shows the number i in its first pixels."""

    def make(n, classes=3, shape=(6, 5, 3)):
        images = np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(n) % 256, np.arange(n) // 256
        return Dataset.from_arrays(images, np.arange(n) % classes, class_names=[f"class{k}" for k in range(classes)])

    return make


@pytest.fixture
def numbers():
    """Reads the numbers of a batch of `numbered` examples."""
    return lambda batch: batch["image"][:, 0, 0, 0].astype(int) + 256 * batch["image"][:, 0, 1, 0].astype(int)
