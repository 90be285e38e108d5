"""The compiled gradient of each family's loss against differences, and with it that of all layers together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt
from tests import gradients

pytestmark = pytest.mark.optimised


def of_two_classes():
    """The relation network, whose one output stands for the first of two classes."""
    net = jt.models.relation_net(4)

    def apply(variables, inputs, **options):
        outputs, state = net.apply(variables, inputs, **options)
        return outputs | {"logits": jnp.concatenate([outputs["logits"], -outputs["logits"]], axis=1)}, state

    return dataclasses.replace(net, apply=apply)


NETS = {  # the smallest of each family, and the shape of its images
    "mlp": (lambda: jt.models.mlp(3, hidden=(8,)), (4, 4, 1)),
    "small_cnn": (lambda: jt.models.small_cnn(3, width=4), (8, 8, 1)),
    "lenet": (lambda: jt.models.lenet(3, dropout=0.0), (16, 16, 1)),
    "conv4": (lambda: jt.models.conv4(3, width=4), (16, 16, 1)),
    "conv4 without norm": (lambda: jt.models.conv4(3, width=4, norm=False), (16, 16, 1)),
    "conv4, strided": (lambda: jt.models.conv4(3, width=4, pooling=False), (16, 16, 1)),
    "relation_net": (of_two_classes, (8, 8, 2)),
    "cifar_resnet": (lambda: jt.models.cifar_resnet(8, 3), (8, 8, 1)),
    "cifar_resnet, preactivation": (lambda: jt.models.cifar_resnet(8, 3, preactivation=True), (8, 8, 1)),
    "resnet": (lambda: jt.models.resnet18(3), (32, 32, 1)),
    "resnet, small images": (lambda: jt.models.resnet18(3, small_images=True), (8, 8, 1)),
    "vgg": (lambda: jt.models.vgg11(3, batch_norm=False, small_images=True), (8, 8, 1)),
    "vgg, batch norm": (lambda: jt.models.vgg11(3, small_images=True), (8, 8, 1)),
    "wide_resnet": (lambda: jt.models.wide_resnet(10, 1, 3), (8, 8, 1)),
    "vit": (lambda: jt.models.vit(8, 1, 2, 3, patch=4), (8, 8, 1)),
}


COSTLY = {"resnet", "resnet, small images", "vgg, batch norm", "cifar_resnet, preactivation"}  # a sister is quick
COSTLY |= {"conv4 without norm", "conv4, strided", "lenet", "wide_resnet"}


@pytest.mark.parametrize(
    ("name", "beside"),
    [(name, "unfused" if name == "small_cnn" else "") for name in NETS if name not in COSTLY]
    + [pytest.param(name, "eager", marks=pytest.mark.slow) for name in NETS],
)
def test_the_compiled_gradient_is_right(name, beside):
    """Of all layers together, and of the first ones, below all pooling."""
    build, shape = NETS[name]
    rng, model = np.random.default_rng(3), build()
    batch = {"image": rng.normal(size=(12, *shape)).astype(np.float32), "label": np.arange(12, dtype=np.int32) % 2}
    objective = jt.classification(model)
    params, state = jax.eval_shape(lambda: objective.init(jax.random.key(2), batch))
    state = jax.tree.map_with_path(lambda path, like: np.full(like.shape, path[-1].key == "var", like.dtype), state)
    loss = gradients.loss_of(objective, state, batch)
    gradients.assert_right(
        loss,
        gradients.filled(params, rng),
        f"/(?:{model.stages[0]})(/|$)",
        **dict.fromkeys([beside] * bool(beside), True),
    )
