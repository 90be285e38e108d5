"""Which features of a tfds set become which columns: on a set made here, and on real ones where they are at hand."""

import io
import os

import cv2
import numpy as np
import pytest

from jaxtransfer.data import Entry, eval_batches, fingerprint, load, pipeline
from jaxtransfer.errors import InputError

DATA = os.environ.get("TFDS_DATA_DIR")
needs_data = pytest.mark.skipif(not DATA, reason="TFDS_DATA_DIR is not set")
N = 7


def png(array):
    return io.BytesIO(cv2.imencode(".png", array)[1].tobytes())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tfds folder with the set `scenes`, and what is in it."""
    from jaxtransfer.data.quiet import quiet_tfds

    rng = np.random.default_rng(1)
    values = {
        "pixels": rng.integers(0, 256, (N, 6, 4, 1)).astype(np.uint8),
        "ground": rng.integers(0, 3, (N, 6, 4, 1)).astype(np.uint8),
        "person": np.arange(N) % 3,
        "pose": np.arange(N) % 2,
        "age": rng.integers(20, 60, N),
        "score": rng.normal(size=N).astype(np.float32),
        "flags": rng.random((N, 3)) < 0.5,
    }
    folder = tmp_path_factory.mktemp("tfds") / "scenes" / "1.0.0"
    folder.mkdir(parents=True)
    with quiet_tfds() as tfds:
        from tensorflow_datasets.core.dataset_info import DatasetIdentity

        of = tfds.features
        features = {
            "pixels": of.Image(shape=(6, 4, 1)),
            "ground": of.LabeledImage(labels=["road", "sky", "void"], shape=(6, 4, 1)),
            "person": of.ClassLabel(names=["ann", "bob", "eve"]),
            "pose": of.ClassLabel(names=["left", "right"]),
            "age": np.int64,
            "score": np.float32,
            "flags": of.Tensor(shape=(3,), dtype=np.bool_),
            "id": of.Text(),
            "objects": of.Sequence({"bbox": of.BBoxFeature(), "label": of.ClassLabel(num_classes=2)}),
        }
        identity = DatasetIdentity("scenes", tfds.core.Version("1.0.0"), str(folder), __name__)
        info = tfds.core.DatasetInfo(
            builder=identity, description="", features=of.FeaturesDict(features), disable_shuffling=True
        )
        writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
        writer.initialize_splits(["train"])
        boxes = [{"bbox": of.BBox(0.0, 0.0, 0.5, 0.5), "label": 1}]
        for i in range(N):
            example = {name: array[i] for name, array in values.items()}
            example |= {"pixels": png(values["pixels"][i]), "ground": png(values["ground"][i])}
            writer.add_examples({"train": [{**example, "id": f"scene {i}", "objects": boxes * i}]})
        writer.close_all()
    return folder.parent.parent, values


def test_features_are_picked_and_renamed(made):
    folder, values = made
    data = load(
        "scenes",
        "train",
        data_dir=folder,
        image="pixels",
        label={"label": "person", "direction": "pose"},
        columns=("age", "score", "flags", "ground"),
    )
    i, f = np.dtype(np.int32), np.dtype(np.float32)
    assert data.entries == {
        "image": Entry((6, 4, 1), np.dtype(np.uint8)),
        "label": Entry((), i, ("ann", "bob", "eve")),
        "direction": Entry((), i, ("left", "right")),
        "age": Entry((), i),
        "score": Entry((), f),
        "flags": Entry((3,), np.dtype(bool)),
        "ground": Entry((6, 4), np.dtype(np.uint8), ("road", "sky", "void")),
    }
    assert data.of_image == {"ground"}
    expected = {**values, "image": values["pixels"], "label": values["person"], "direction": values["pose"]}
    expected["ground"] = values["ground"][..., 0]
    for one in (data, data.decoded()):
        batch = one.read([5, 0, 2])
        for name in data.entries:
            np.testing.assert_array_equal(batch[name], expected[name][[5, 0, 2]])
            np.testing.assert_array_equal(one.column(name), expected[name])
            assert batch[name].dtype == data.entries[name].dtype
    assert fingerprint(data) == fingerprint(data.decoded())
    assert pipeline(data, 3).batch(1)["ground"].shape == (3, 6, 4)
    last = list(eval_batches(data, 4))[-1]
    assert last["mask"].tolist() == [1, 1, 1, 0]
    np.testing.assert_array_equal(last["ground"][:3], expected["ground"][4:])
    assert not last["flags"][3].any()


def test_several_labels_keep_their_names(made):
    folder, values = made
    data = load("scenes", "train", data_dir=folder, label=("person", "pose"))
    assert list(data.entries) == ["person", "pose"]  # there is no feature `image`
    np.testing.assert_array_equal(data.column("pose"), values["pose"])
    assert sorted(data.subset(per_class=1, by="pose").column("pose")) == [0, 1]
    one = load("scenes", "train[:3]", data_dir=folder, label="pose")
    assert (one.class_names, one.labels.tolist()) == (("left", "right"), [0, 1, 0])
    other = load("scenes", "train[:3]", data_dir=folder, label="person")
    assert {key for key, value in fingerprint(one).items() if fingerprint(other)[key] != value} == {
        "class_names",
        "features",
    }
    assert list(load("scenes", "train", data_dir=folder, columns="age").entries) == ["age"]


def test_classes_of_pixels_are_brought_to_the_shape_of_the_image(made):
    folder, values = made
    options = {"data_dir": folder, "image": "pixels", "columns": ("ground",)}
    half = load("scenes", "train", image_shape=(3, 2, 3), **options)
    assert half.read([1])["image"].shape == (1, 3, 2, 3)
    np.testing.assert_array_equal(half.read([1, 4])["ground"], values["ground"][[1, 4], 1::2, 1::2, 0])
    np.testing.assert_array_equal(half.column("ground"), values["ground"][:, 1::2, 1::2, 0])
    twice = load("scenes", "train", image_shape=(12, 8, 1), **options).read([2])["ground"][0]
    np.testing.assert_array_equal(twice, np.kron(values["ground"][2, ..., 0], np.ones((2, 2), int)))


def test_texts_become_tokens(made):
    folder, values = made
    data = load("scenes", "train[2:5]", data_dir=folder, label="pose", tokens="id", words=4)
    assert data.entries["tokens"].class_names == ("<padding>", "<unknown>", "scene", "0", "1", "2")
    assert data.column("tokens").tolist() == [[2, 5], [2, 1], [2, 1]]
    assert data.column("tokens_mask").all()
    np.testing.assert_array_equal(data.labels, values["pose"][2:5])
    alone = load("scenes", "train", data_dir=folder, tokens={"name": "id"}, length=3, train="train[:1]").take(2)
    assert alone.read([1, 0])["name"].tolist() == [[3, 1, 0], [3, 2, 0]]
    for options, message in (
        ({"tokens": "objects"}, "'objects' is not one text per example"),
        ({"tokens": "ids"}, r"unknown feature of scenes 'ids' \(did you mean 'id'"),
        ({"tokens": "id", "train": "test"}, "cannot read the texts of split 'test' .* by train="),
        ({"length": 3}, "length= is of texts"),
        ({"tokens": "id", "drop": ("age",)}, "drop= is of tables"),
    ):
        with pytest.raises(InputError, match=message):
            load("scenes", "train", data_dir=folder, **options)


REFUSED = [
    ({}, "no uint8 feature 'image'.*Name those to load.*image=.*label="),
    ({"label": "id"}, "'id' is text, and batches are of numbers; as words of a vocabulary: tokens='id'"),
    ({"columns": "objects"}, "'objects' has .*bbox.* of varying length.*boxes"),
    ({"label": "poze"}, r"unknown feature of scenes 'poze' \(did you mean 'pose'\?\)"),
    ({"columns": {"mask": "ground"}}, "can't be called 'mask'"),
    ({"label": "pose", "columns": {"label": "person"}}, "two columns can't both be called 'label'"),
    ({"label": 3}, "label= takes a name, names"),
    ({"columns": ("age", "age")}, "names each feature once"),
    ({"image": "age"}, "'age' is no uint8 image"),
    ({"label": "pose", "image_shape": (8, 8, 1)}, "image_shape= is of images, and none is loaded"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_unusable_choices_are_told(made, asked, message):
    with pytest.raises(InputError, match=message):
        load("scenes", "train", data_dir=made[0], **asked)


def test_folders_and_the_digits():
    with pytest.raises(InputError, match="a folder of images has a class for each and nothing else to name"):
        load("folder:images", "train", label="kind")
    rows = load("digits/upright", "test", columns={"index": "row"})
    plain = load("digits/upright", "test")
    np.testing.assert_array_equal(rows.labels, plain.labels)
    assert len(set(rows.column("index"))) == len(rows)
    assert list(load("digits/upright", "test", label=()).entries) == ["image"]
    with pytest.raises(InputError, match="the digits have no texts"):
        load("digits/upright", "test", tokens="row")


@needs_data
def test_real_sets_with_several_labels_and_with_masks():
    faces = load("cmu_faces", "test", label=("person", "pose", "expression", "eyes"))
    assert {name: entry.classes for name, entry in faces.entries.items()} == {
        "image": None,
        "person": 20,
        "pose": 4,
        "expression": 4,
        "eyes": 2,
    }
    assert faces.column("eyes").max() == 1
    scenes = load("camvid", "validation", columns={"ground": "segmentation"}).take(3).decoded()
    assert scenes.read([0, 2])["ground"].shape == (2, 120, 160)
    assert scenes.entries["ground"].classes == 12
    with pytest.raises(InputError, match=r"'objects' has .* of varying length"):
        load("bccd", "test", label="objects", image_shape=(32, 32, 3))
