import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtransfer.data import available, digits, load, prepared
from jaxtransfer.errors import InputError

DATA = os.environ.get("TFDS_DATA_DIR")
needs_data = pytest.mark.skipif(not DATA, reason="TFDS_DATA_DIR is not set")


@pytest.fixture
def data_dir(tmp_path):
    """A tfds folder with one data set in no catalogue: the digits under another name."""
    shutil.copytree(digits.prepare("upright"), tmp_path / "tfds" / "letters" / "1.0.0")
    return tmp_path / "tfds"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_prepared_folder_loads_by_its_name_and_version(data_dir, monkeypatch):
    expected = load("digits/upright", "test")
    for name in ("letters", "letters:1.0.0"):
        dataset = load(name, "test", data_dir=data_dir)
        assert dataset.name == name
        np.testing.assert_array_equal(dataset.labels, expected.labels)
        np.testing.assert_array_equal(dataset[17]["image"], expected[17]["image"])
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(load("letters", "train")) == 1201


def test_splits_are_sliced_as_in_tfds():
    labels = load("digits/upright", "train").labels
    for split, part in [
        ("train[:100]", labels[:100]),
        ("train[10%:]", labels[120:]),
        ("train[-5:]", labels[-5:]),
        ("train+test[:3]", np.append(labels, load("digits/upright", "test").labels[:3])),
    ]:
        np.testing.assert_array_equal(load("digits/upright", split).labels, part)


def test_images_are_brought_to_a_shape():
    dataset = load("digits/upright", "train[:20]", image_shape=(16, 12, 3))
    assert dataset.image_shape == dataset[3]["image"].shape == (16, 12, 3)
    decoded = dataset.decoded()
    np.testing.assert_array_equal(decoded[3]["image"], dataset[3]["image"])
    assert (decoded.source.images[..., 0] == decoded.source.images[..., 2]).all()
    with pytest.raises(InputError, match="image_shape must be"):
        load("digits/upright", "train", image_shape=(8, 8, 2))


def test_unknown_names_list_what_is_there(data_dir):
    with pytest.raises(InputError, match=r"'leters' \(did you mean 'letters'\?\); known: digits/inverted, .*, letters"):
        load("leters", "train", data_dir=data_dir)
    with pytest.raises(InputError, match="did you mean 'digits/rotated'"):
        load("digits/rotate", "train")
    for name in ("digits", "digits/upright:2.0.0", "", "../letters", "letters:9.9.9", "no such/thing/here"):
        with pytest.raises(InputError):
            load(name, "train", data_dir=data_dir)


@pytest.mark.parametrize(("name", "split"), [(None, "train"), (Path("images"), "train"), ("digits/upright", None)])
def test_names_are_texts(name, split):
    with pytest.raises(InputError, match="load takes the names of the data and of a split, got"):
        load(name, split)


def test_unknown_splits_list_what_is_there(data_dir):
    for name in ("letters", "digits/upright"):
        with pytest.raises(InputError, match=r"'tain' \(did you mean 'train'\?\); known: test, train"):
            load(name, "tain[:10]", data_dir=data_dir)
        for split in ("train[", "train[:0]", "train[a:b]"):
            with pytest.raises(InputError, match="split"):
                load(name, split, data_dir=data_dir)


def test_a_catalogue_name_that_is_not_prepared_tells_what_to_install(data_dir, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else real(name))
    with pytest.raises(InputError, match=r"mnist is not prepared.*pip install 'jaxtransfer\[tensorflow\]'"):
        load("mnist", "train", data_dir=data_dir)
    with pytest.raises(InputError, match="mnist"):
        load("mnist/no_such_config", "train", data_dir=data_dir)


def test_tfrecord_needs_tensorflow_and_is_then_read_into_memory(data_dir, monkeypatch):
    import tensorflow_datasets as tfds

    edit(data_dir / "letters" / "1.0.0" / "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else real(name))
    with pytest.raises(InputError, match=r"not in array_record form.*jaxtransfer\[tensorflow\]"):
        load("letters", "train", data_dir=data_dir)
    # A stand-in for TensorFlow's reader.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    examples = [dict(load("digits/upright", "test")[i]) for i in range(5)]
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", lambda self, split, shuffle_files: examples)
    monkeypatch.setattr(tfds, "as_numpy", lambda dataset: dataset)
    dataset = load("letters", "test", data_dir=data_dir, image_shape=(4, 4, 3))
    assert dataset.in_memory
    assert dataset.source.images.shape == (5, 4, 4, 3)
    assert dataset.labels.tolist() == [example["label"] for example in examples]


def test_features_without_labels_or_images_are_refused(data_dir):
    path = data_dir / "letters" / "1.0.0" / "features.json"

    def rename(old, new):
        edit(
            path,
            lambda spec: spec["featuresDict"]["features"].update({new: spec["featuresDict"]["features"].pop(old)}),
        )

    rename("label", "target")
    with pytest.raises(InputError, match=r"no class-label feature 'label'; its features: image, row, target"):
        load("letters", "train", data_dir=data_dir)
    rename("target", "label")
    rename("image", "picture")
    with pytest.raises(InputError, match="no uint8 feature 'image'"):
        load("letters", "train", data_dir=data_dir)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "letters-train.array_record"])
def test_damaged_files_are_an_input_error(data_dir, file):
    folder = data_dir / "letters" / "1.0.0"
    damaged = folder / file if file.endswith("json") else next(folder.glob("*train*"))
    damaged.write_bytes(b"{")
    with pytest.raises(InputError, match="letters"):
        load("letters", "train", data_dir=data_dir)


def test_labels_out_of_range_are_named(data_dir):
    path = data_dir / "letters" / "1.0.0" / "features.json"
    edit(path, lambda spec: spec["featuresDict"]["features"]["label"]["classLabel"].update(numClasses="7"))
    dataset = load("letters", "train", data_dir=data_dir)
    with pytest.raises(InputError, match=r"example \d+ has label [789], expected 0 to 6 \(7 classes\)"):
        _ = dataset.labels


def test_the_newest_version_is_taken(tmp_path):
    for version in ("1.2.0", "1.10.0", "1.9.0", "2.0.0"):
        (tmp_path / "some" / version).mkdir(parents=True)
        if version != "2.0.0":  # half-written
            (tmp_path / "some" / version / "dataset_info.json").write_text("{}")
    assert prepared.find("some", tmp_path).name == "1.10.0"
    assert prepared.find("some:1.9.0", tmp_path).name == "1.9.0"
    assert prepared.find("some:2.0.0", tmp_path) is None
    assert prepared.prepared_sets(tmp_path) == {"some": tmp_path / "some" / "1.10.0"}
    assert prepared.prepared_sets(tmp_path / "missing") == {}


def test_available_lists_the_digits_and_the_folder_and_survives_damage(data_dir):
    for name in ("damaged", "tfrecords", "unlabelled"):
        shutil.copytree(data_dir / "letters", data_dir / name)
    (data_dir / "damaged" / "1.0.0" / "features.json").write_text("{")
    edit(
        data_dir / "tfrecords" / "1.0.0" / "dataset_info.json",
        lambda info: info.update(fileFormat="tfrecord"),
    )
    edit(
        data_dir / "unlabelled" / "1.0.0" / "features.json",
        lambda spec: spec["featuresDict"]["features"].pop("label"),
    )
    entries = {entry.name: entry for entry in available(data_dir)}
    assert [name for name in entries if name.startswith("digits/")] == [f"digits/{c}" for c in digits.CONFIGS]
    assert entries["letters"][1:] == (("train", "test"), (1201, 596), 10, (8, 8, 1), True, "")
    assert entries["digits/upright"].prepared
    assert "needs jaxtransfer[tensorflow]" in entries["tfrecords"].note
    assert "no class-label feature" in entries["unlabelled"].note
    assert entries["damaged"].note
    assert entries["damaged"].classes is None


SLOW = (
    *("tensorflow_datasets", "tensorflow", "importlib_resources", "sklearn", "scipy.stats", "pandas", "torch"),
    *("matplotlib", "cv2", "PIL", "orbax", "grain", "tyro", "tensorboardX"),
)


def loaded_by(lines, *words):
    """Which of the slow packages a program of its own has imported."""
    script = f"import sys\n{lines}\nprint(*[name for name in {SLOW} if name in sys.modules])"
    code = [sys.executable, "-W", "error", "-c", script, *map(str, words)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.slow
def test_the_face_imports_no_slow_package():
    assert (
        loaded_by("import jaxtransfer as jt\nassert all(hasattr(jt.data, name) for name in jt.data.__all__)") == set()
    )


@pytest.mark.slow
def test_arrays_and_folders_need_no_tfds(tmp_path):
    import cv2

    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(5):
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), np.full((8, 8, 3), number, np.uint8))
    lines = """
import numpy as np
import jaxtransfer as jt
data = jt.data.Dataset.from_arrays(np.zeros((8, 4, 4, 1), np.uint8), np.arange(8) % 2)
for one in (data, jt.data.load("folder:" + sys.argv[1], "train")):
    next(jt.data.pipeline(one, 4).iterate())
    list(jt.data.eval_batches(one, 4))
    jt.data.Episodes(one, ways=2, shots=1, queries=1).batches().batch(0)
    jt.data.fingerprint(one.subset(per_class=2))
"""
    assert loaded_by(lines, tmp_path) <= {"cv2", "grain", "orbax"}  # which grain imports


@needs_data
@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "classes"),
    [
        ("omniglot:3.0.0", 19280, 13180, (105, 105, 3), 1623),
        ("usps", 7291, 2007, (16, 16, 1), 10),
        ("cifar10", 20000, 10000, (32, 32, 3), 10),
    ],
)
def test_real_data_sets(name, train, test, shape, classes):
    if not (Path(DATA) / name.partition(":")[0]).is_dir():
        pytest.skip(f"{name} is not in TFDS_DATA_DIR")
    assert [len(load(name, split)) for split in ("train", "test")] == [train, test]
    dataset = load(name, "test[:300]")
    assert (dataset.image_shape, dataset.classes) == (shape, classes)
    decoded = dataset.decoded()
    np.testing.assert_array_equal(decoded.labels, dataset.labels)
    np.testing.assert_array_equal(decoded[7]["image"], dataset[7]["image"])
    small = load(name, "test[:3]", image_shape=(28, 28, 1)).decoded()
    assert small.source.images.shape == (3, 28, 28, 1)
    assert 10 < small.source.images.std() < 130
