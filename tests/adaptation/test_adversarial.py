"""Adversarial methods: the same on any devices, and against losses and slopes that are written out."""

import optax
import pytest

import jaxtransfer as jt
from tests.contract import assert_same_on_any_devices

A = jt.adaptation


def beside(term):
    """The source's labels, and a term; one run of the model."""
    return lambda model: jt.together(jt.classification(model).on("source") + term(model))


def small(name):
    return A.discriminator(hidden=(6,), name=name)


OBJECTIVES = {
    "dann": beside(lambda model: A.dann(model, discriminator=small("d"), coefficient=0.7)),
    "cdan": beside(lambda model: A.cdan(model, discriminator=small("d"), coefficient=lambda step: 0.1 * step)),
    "cdan, random map": beside(lambda model: A.cdan(model, discriminator=small("d"), exact_up_to=0, random_dim=5)),
    "mcd": lambda model: A.mcd(model, optax.sgd(0.05, momentum=0.9), repeat=2),
    "mdd": beside(lambda model: A.mdd(model, margin=2.0, coefficient=0.3)),
    "bsp": beside(lambda model: A.bsp(model, k=2, strength=0.01)),
}
FAST = {"dann", "mcd"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in OBJECTIVES])
def test_the_same_on_any_devices(name, mesh_of):
    assert_same_on_any_devices(OBJECTIVES[name], mesh_of)
