"""One domain's part of a batch."""

import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.adaptation.domain import Domain
from tests.contract import KEY, assert_same_on_any_devices, normalised


def apart(model):
    """How far the mean features of two domains are from each other."""
    source, target = (Domain.of(model, name) for name in ("source", "target"))

    def loss(outputs, params, state, batch, ctx):
        means = []
        for domain in (source, target):
            rows, mask = domain.gathered(outputs, "features", batch, ctx)
            means.append((rows * mask[:, None]).sum(0) / mask.sum())
        value = ((means[0] - means[1]) ** 2).sum()
        return value, state, {"apart": jt.Mean(value, value * 0 + 1)}

    return jt.Objective("apart", (source.forward, target.forward), loss)


def test_a_term_of_two_domains_is_the_same_on_any_devices_and_shares_the_run_of_the_source(mesh_of):
    objective = None

    def make(model):
        nonlocal objective
        objective = jt.classification(model).on("source") + apart(model)
        return objective

    assert_same_on_any_devices(make, mesh_of)
    assert len(objective.forwards) == 2


def test_a_batch_without_domains_is_one_clear_error():
    image = np.zeros((4, 4, 4, 1), np.float32)
    with pytest.raises(jt.InputError, match="source"):
        jt.init(apart(normalised([])), optax.sgd(0.1), KEY, {"image": image})
