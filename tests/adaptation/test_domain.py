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


ROWS = {
    "alignment": lambda m: jt.adaptation.dan(m) + jt.adaptation.deep_coral(m) + jt.adaptation.afn(m),
    "adversaries": lambda m: (
        jt.adaptation.dann(m, discriminator=jt.adaptation.discriminator(hidden=(6,)))
        + jt.adaptation.mdd(m)
        + jt.adaptation.bsp(m)
    ),
    "predictions": lambda m: jt.adaptation.bnm(m) + jt.adaptation.mcc(m) + jt.bss(m).on("target"),
    "penalties": lambda m: (
        jt.adaptation.irm(m, domains=("source", "target"))
        + jt.adaptation.vrex([jt.classification(m).on(name) for name in ("source", "target")])
        + jt.adaptation.fishr(m, domains=("source", "target"))
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "alignment" else pytest.mark.slow) for n in ROWS])
def test_where_the_shorter_of_two_evaluation_sets_has_ended_nothing_is_counted_of_both(name):
    """Batches of one domain alone say nothing of two, and would be averaged with those of both."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (rows, 4, 4, 1)).astype(np.uint8) for rows in (24, 8)]
    source, target = (jt.data.Dataset.from_arrays(one, np.arange(len(one)) % 4) for one in images)
    objective = ROWS[name](normalised([]))
    batches = list(jt.data.zipped(source=jt.data.eval_batches(source, 8), target=jt.data.eval_batches(target, 8)))
    assert [batch["target"]["mask"].sum() for batch in batches] == [8, 0, 0]
    state = jt.init(objective, optax.sgd(0.1), KEY, batches[0])
    run = jt.eval_step(objective)
    whole, first = run(state, batches), run(state, batches[:1])
    for metric in {"loss", *(term.name for _, term in objective.terms)}:
        assert first[metric] != 0, metric
        assert whole[metric] == pytest.approx(first[metric], rel=1e-5), metric
