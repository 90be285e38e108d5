import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer import models
from jaxtransfer.errors import InputError

PAPERS = {  # trainable parameters; 1000 classes for ImageNet nets (torchvision, timm), 10 for the others
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "preact-resnet20": 269_722,
    "resnet18": 11_173_962,
    "resnet18-imagenet": 11_689_512,
    "resnet34-imagenet": 21_797_672,
    "resnet50-imagenet": 25_557_032,
    "resnet101-imagenet": 44_549_160,
    "resnet152-imagenet": 60_192_808,
    "wide-resnet50-2": 68_883_240,
    "wide-resnet101-2": 126_886_696,
    "mobilenet-v2": 3_504_872,
    "vgg11-imagenet": 132_863_336,
    "vgg13-imagenet": 133_047_848,
    "vgg16-imagenet": 138_357_544,
    "vgg16-bn-imagenet": 138_365_992,
    "vgg19-imagenet": 143_667_240,
    "vgg19-bn-imagenet": 143_678_248,
    "vgg16-bn": 14_728_266,
    "wrn-16-4": 2_748_890,
    "wrn-28-10": 36_479_194,
    "efficientnet-lite0": 4_652_008,
    "efficientnet-lite1": 5_416_680,
    "efficientnet-lite2": 6_092_072,
    "lenet": 520 + 25_050 + 400_500 + 5_010,  # Transfer-Learning-Library
    "vit-ti-16": 5_717_416,
    "vit-s-16": 22_050_664,
    "vit-b-16": 86_567_656,
    "vit-s-32": 22_878_952,
    "vit-b-32": 88_224_232,
    "minilm-l6": 22_565_376 + 385_000,  # transformers' without the head
    "bert-base": 109_482_240 + 769_000,
    "distilbert-base": 66_362_880 + 769_000,
}

DEEP = {
    name
    for name in models.ZOO
    if re.search(r"(34|44|56|101|110|152|16|19)(?!\d)|vit-[sb]|vit-ti-32|wrn-(28|40)|wide-resnet", name)
}  # of the same code
FAMILIES = ["mlp", "linear", "small-cnn", "conv4", "conv4-strided", "resnet20", "preact-resnet20", "resnet18"]
FAMILIES += ["resnet18-imagenet", "resnet50", "vgg11-bn", "vgg11", "wrn-16-2"]
FAMILIES += ["vgg16-imagenet", "vgg16-bn-imagenet", "vit-ti-4", "vit-ti-16", "lenet"]


SISTERS = {"resnet18-imagenet", "resnet50", "vgg16-imagenet", "vgg16-bn-imagenet", "vit-ti-16"}  # of others here
SISTERS |= {"efficientnet-lite1", "efficientnet-lite2"}


def sparing(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


def classes_of(name):
    return 1000 if models.ZOO[name].image[0] >= 224 else 10


@functools.cache  # tracing the initialisation is what takes time
def model_and_shapes(name):
    """A network named "student", two of its images, and its variables, in shapes."""
    model = models.create(name, classes_of(name), name_in_params="student")
    images = models.ZOO[name].inputs(2)
    return model, images, jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)


@pytest.mark.parametrize("name", ["resnet20", "vgg16-bn-imagenet", "vit-b-16"])
def test_count_parameters(name):
    model = models.create(name, classes_of(name))
    assert models.count_parameters(model, models.ZOO[name].image) == PAPERS[name]


def test_conv4_has_the_parameters_of_the_few_shot_papers():
    assert models.count_parameters(models.create("conv4-32", 5), (84, 84, 3)) == 32_901  # MAML, 5 ways
    assert models.count_parameters(models.conv4(5), (28, 28, 1)) == 112_261


@pytest.mark.slow
@pytest.mark.parametrize("name", sparing(models.ZOO, DEEP | SISTERS))
def test_counts_and_stages(name):
    """The papers' numbers, and stages that partition the parameters."""
    model, _, variables = model_and_shapes(name)
    assert model.name == "student"

    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == PAPERS.get(name, count)
    paths = ["/".join(p.key for p in path) for path, _ in jax.tree.leaves_with_path(variables["params"])]
    for path in paths:
        matched = [s for s in model.stages if re.search(rf"(^|/)(?:{s})(/|$)", f"student/{path}")]
        assert len(matched) == 1, (path, matched)
        assert (matched == ["head"]) == path.startswith("head/")
    for stage in model.stages:
        assert any(re.search(rf"(^|/)(?:{stage})(/|$)", path) for path in paths), stage
    assert model.head == "head"


@pytest.mark.parametrize("name", sparing(FAMILIES, SISTERS))
def test_outputs_and_state(name):
    model, images, variables = model_and_shapes(name)

    def forward(variables, images):
        return model.apply(variables, images, train=True, key=jax.random.key(1))

    outputs, state = jax.eval_shape(forward, variables, images)
    assert outputs["logits"].shape == (2, classes_of(name))
    assert outputs["features"].shape == (2, variables["params"]["head"]["kernel"].shape[0])
    assert all(o.shape[0] == 2 and 0 not in o.shape for o in outputs.values())
    assert {f"stage{i}" for s in model.stages for i in re.findall(r"stage(\d+)", s)} <= set(outputs)
    assert state == {k: v for k, v in variables.items() if k != "params"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stem", "stages"),
    [
        ("resnet20", (32, 32, 16), [(32, 32, 16), (16, 16, 32), (8, 8, 64)]),
        ("resnet18", (32, 32, 64), [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512)]),
        ("resnet50-imagenet", (56, 56, 64), [(56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)]),
        ("wrn-16-2", (32, 32, 16), [(32, 32, 32), (16, 16, 64), (8, 8, 128)]),
        ("vgg11-imagenet", None, [(112, 112, 64), (56, 56, 128), (28, 28, 256), (14, 14, 512), (7, 7, 512)]),
        ("conv4", None, [(14, 14, 64), (7, 7, 64), (3, 3, 64), (1, 1, 64)]),
        ("conv4-strided", None, [(14, 14, 64), (7, 7, 64), (4, 4, 64), (2, 2, 64)]),
        ("vit-ti-4", (65, 192), [(65, 192)] * 12),
    ],
)
def test_maps(name, stem, stages):
    model, images, variables = model_and_shapes(name)
    forward = functools.partial(model.apply, train=False, key=None)
    shapes = {k: v.shape[1:] for k, v in jax.eval_shape(forward, variables, images)[0].items()}
    assert shapes.get("stem") == stem
    assert [shapes[f"stage{i}"] for i in range(1, len(stages) + 1)] == stages


@pytest.mark.slow
@pytest.mark.parametrize("name", sparing(FAMILIES[:13], {"resnet50", "vgg11-bn"}))
@pytest.mark.parametrize("size", [pytest.param((5, 3), marks=pytest.mark.slow), (1, 1)])
def test_small_and_odd_images_fit(name, size):
    model = models.create(name, 3)

    def forward(x):
        return model.apply(model.init(jax.random.key(0), x), x, train=True, key=jax.random.key(1))[0]

    outputs = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, *size, 1), jnp.float32))
    assert outputs["logits"].shape == (2, 3)
    assert all(0 not in o.shape for o in outputs.values())


def test_unknown_name_lists_the_closest():
    with pytest.raises(InputError, match="did you mean 'resnet20'"):
        models.create("resnet-20", 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.cifar_resnet(21, 10),
        lambda: models.resnet(19, 10),
        lambda: models.resnet(34, 10, wider=2),
        lambda: models.resnet(50, 10, wider=0),
        lambda: models.mobilenet_v2(10, width=0),
        lambda: models.vgg(12, 10),
        lambda: models.wide_resnet(17, 2, 10),
        lambda: models.vit(100, 2, 3, 10),
    ],
)
def test_impossible_sizes_are_refused(make):
    with pytest.raises(InputError, match="expected"):
        make()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "depth"),
    [
        *(("cifar_resnet", depth) for depth in (20, 32)),
        *(("resnet", depth) for depth in (18,)),
        *(("vgg", depth) for depth in (11,)),
        *(pytest.param("cifar_resnet", depth, marks=pytest.mark.slow) for depth in (44, 56, 110)),
        *(pytest.param("resnet", depth, marks=pytest.mark.slow) for depth in (34, 50, 101, 152)),
        *(pytest.param("vgg", depth, marks=pytest.mark.slow) for depth in (13, 16, 19)),
    ],
)
def test_named_constructors_are_the_general_ones(make, depth):
    def count(model):
        return models.count_parameters(model, (8, 8, 3))

    if make == "vgg":
        small = {"batch_norm": False, "small_images": True}
        assert count(getattr(models, f"vgg{depth}")(9, **small)) == count(models.vgg(depth, 9, **small))
    elif make == "resnet":
        assert count(getattr(models, f"resnet{depth}")(1000)) == PAPERS[f"resnet{depth}-imagenet"]
    else:
        assert count(getattr(models, f"resnet{depth}")(10)) == PAPERS[f"resnet{depth}"]


@pytest.mark.parametrize("classes", [0, -3, 2.5, "10", None])
def test_networks_without_outputs_are_refused(classes):
    with pytest.raises(InputError, match="mlp: classes must be a whole number of at least 1, got"):
        models.create("mlp", classes)
