"""Values that no run can have are refused where they are given, before anything is traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)


def init(key, x):
    return {"params": {"w": jax.random.normal(key, (5, 3))}}


def apply(variables, x, *, train, key):
    z = x @ variables["params"]["w"]
    return {"projection": z, "prediction": 2 * z, "logits": z, "features": z}, {}


NET = jt.Model(init, apply, name="net")
TEACHER = jt.frozen(NET.named("teacher"), init(jax.random.key(1), None))
ANCHOR = {"net": init(KEY, None)["params"]}


def a_batch(rows=4):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    return {"image": x, "image2": x[:, ::-1].copy(), "label": rng.integers(0, 3, rows), "index": np.arange(rows)}


SCALES = {  # what must be positive and finite
    "info_nce": lambda v: jt.info_nce(NET, temperature=v),
    "info_nce, learned": lambda v: jt.info_nce(NET, temperature=v, learn_temperature=True),
    "siglip": lambda v: jt.siglip(NET, temperature=v),
    "simclr": lambda v: jt.simclr(NET, temperature=v),
    "decoupled": lambda v: jt.decoupled(NET, temperature=v),
    "decoupled, sigma": lambda v: jt.decoupled(NET, sigma=v),
    "supcon": lambda v: jt.supcon(NET, temperature=v),
    "moco": lambda v: jt.moco(NET, temperature=v),
    "nnclr": lambda v: jt.nnclr(NET, temperature=v),
    "swav": lambda v: jt.swav(NET, temperature=v),
    "swav, epsilon": lambda v: jt.swav(NET, epsilon=v),
    "dino, student": lambda v: jt.dino(NET, student_temperature=v),
    "dino, teacher": lambda v: jt.dino(NET, teacher_temperature=v),
    "distillation": lambda v: jt.distillation(NET, TEACHER, temperature=v),
    "mutual": lambda v: jt.mutual_learning([NET, NET.named("b")], temperature=v),
    "crd": lambda v: jt.crd(NET, TEACHER, examples=9, temperature=v),
    "losses.sinkhorn": lambda v: jt.losses.sinkhorn(jnp.ones((2, 3)), epsilon=v),
    "losses.swav": lambda v: jt.losses.swav([jnp.ones((2, 3))] * 2, epsilon=v),
    "losses.dcl": lambda v: jt.losses.dcl(jnp.ones((2, 3)), jnp.ones((2, 3)), sigma=v),
    "losses.vid": lambda v: jt.losses.vid(jnp.ones((2, 3)), jnp.ones((2, 3)), scale=jnp.ones(3), eps=v),
    "losses.pkt": lambda v: jt.losses.pkt(jnp.ones((2, 3)), jnp.ones((2, 3)), eps=v),
    "losses.supcon": lambda v: jt.losses.supcon(jnp.ones((2, 3)), jnp.zeros(2, int), base_temperature=v),
    "losses.crd": lambda v: jt.losses.crd(
        *[jnp.ones((2, 3))] * 2, jt.losses.crd_memory(KEY, 4, 3), jnp.arange(2), jnp.ones((2, 1), int), temperature=v
    ),
}
STRENGTHS = {  # what must be finite and not negative
    "l2": lambda v: jt.l2(strength=v),
    "l2_sp": lambda v: jt.l2_sp(ANCHOR, strength=v),
    "fisher_l2_sp": lambda v: jt.fisher_l2_sp(ANCHOR, jax.tree.map(jnp.abs, ANCHOR), strength=v),
    "fisher": lambda v: jt.fisher_l2_sp(ANCHOR, jax.tree.map(lambda w: w * 0 + v, ANCHOR)),
    "barlow_twins": lambda v: jt.barlow_twins(NET, strength=v),
    "vicreg": lambda v: jt.vicreg(NET, covariance=v),
    "teachers": lambda v: jt.distillation(NET, [TEACHER, TEACHER], weights=(1.0, v)),
    "losses.barlow_twins": lambda v: jt.losses.barlow_twins(jnp.ones((2, 3)), jnp.ones((2, 3)), strength=v),
    "losses.vicreg": lambda v: jt.losses.vicreg(jnp.ones((2, 3)), jnp.ones((2, 3)), variance=v),
    "losses.dkd": lambda v: jt.losses.dkd(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros(2, int), beta=v),
    "losses.gaussian_correlation": lambda v: jt.losses.gaussian_correlation(jnp.ones((2, 3)), gamma=v),
    "views.simclr": lambda v: jt.data.views.simclr(strength=v),
    "losses.dist": lambda v: jt.losses.dist(jnp.ones((2, 3)), jnp.ones((2, 3)), gamma=v),
}
SHARES = {  # what must be in [0, 1]
    "ema": lambda v: jt.ema(NET, v),
    "byol": lambda v: jt.byol(NET, decay=v),
    "moco": lambda v: jt.moco(NET, decay=v),
    "dino": lambda v: jt.dino(NET, decay=v),
    "mean_teacher": lambda v: jt.mean_teacher(NET, decay=v),
    "dino, centre": lambda v: jt.dino(NET, center_momentum=v),
    "crd": lambda v: jt.crd(NET, TEACHER, examples=9, momentum=v),
    "losses.dino_center": lambda v: jt.losses.dino_center(jnp.zeros(3), [jnp.ones((2, 3))], momentum=v),
}
CASES = [
    *((make, value) for make in SCALES.values() for value in (0.0, -1.0, np.nan, np.inf)),
    *((make, value) for make in STRENGTHS.values() for value in (-1e-3, np.nan, np.inf)),
    *((make, value) for make in SHARES.values() for value in (-0.1, 1.1, np.nan)),
    (lambda v: jt.swav(NET, prototypes=v), 0),
    (lambda v: jt.swav(NET, iterations=v), 0),
    (lambda v: jt.swav(NET, freeze=v), -1),
    (lambda v: jt.siglip(NET, bias=v), np.nan),
    (lambda v: jt.losses.attention_transfer(jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3)), p=v), 0.5),
    (lambda v: jt.distillation(NET, [TEACHER, TEACHER], weights=(v, v)), 0.0),
    (lambda v: jt.distillation(NET, TEACHER, weights=[[v]]), 1.0),
    (lambda v: jt.l2(strength=v), "much"),
    (lambda v: v * jt.l2(), np.nan),
    (lambda v: jt.l2() / v, np.nan),
]
NAMES = [*(f"{n}={v}" for n in SCALES for v in (0, -1, "nan", "inf"))]
NAMES += [*(f"{n}={v}" for n in STRENGTHS for v in (-1e-3, "nan", "inf")), *(f"{n}={v}" for n in SHARES for v in "-+n")]


@pytest.mark.parametrize(("make", "value"), CASES, ids=[*NAMES, *map(str, range(len(CASES) - len(NAMES)))])
def test_a_value_that_no_run_can_have_is_refused(make, value):
    with pytest.raises(jt.InputError, match=r"must|is in \[0, 1\]|expected strengths"):
        make(value)


def test_values_at_the_edge_are_taken():
    half = jnp.float32(0.5)
    taken = ((STRENGTHS, 0.0), (SHARES, 0.0), (SHARES, 1.0), (SCALES, half))
    for name, make, value in ((name, make, value) for makes, value in taken for name, make in makes.items()):
        if name.startswith("losses."):
            jax.eval_shape(functools.partial(make, value))  # the value is checked, nothing is compiled
        else:
            make(value)
    _ = -0.5 * jt.distillation(NET, TEACHER) - jt.l2()  # the weight of a term may be negative
    jt.dino(NET, decay=lambda step: 2.0, teacher_temperature=lambda step: 0.0)  # of a schedule nothing is known


ALONE = {
    "simclr": lambda: jt.simclr(NET),
    "decoupled": lambda: jt.decoupled(NET),
    "info_nce": lambda: jt.info_nce(NET),
    "two towers": lambda: jt.info_nce(NET, NET.named("b"), learn_temperature=True),
    "siglip": lambda: jt.siglip(NET),
    "supcon": lambda: jt.supcon(NET),
    "nnclr": lambda: jt.nnclr(NET, queue=8),
    "barlow_twins": lambda: jt.barlow_twins(NET),
    "vicreg": lambda: jt.vicreg(NET),
    "swav": lambda: jt.swav(NET, prototypes=3),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_batch_of_one_has_nothing_to_be_told_from(name):
    objective = jt.classification(NET).named("ce") + ALONE[name]()
    with pytest.raises(jt.InputError, match="needs two examples or more"):
        jt.init(objective, optax.sgd(0.1), KEY, a_batch(1))


@pytest.mark.slow
def test_one_example_per_device_is_a_batch_of_several():
    objective, mesh = jt.simclr(NET), jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    losses = []
    for mode in ("jit", "pmap"):
        state = jt.init(objective, optax.sgd(0.1), KEY, a_batch(2))
        _, metrics = jt.train_step(objective, optax.sgd(0.1), mesh=mesh, mode=mode)(state, a_batch(2))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0
    for needs_no_others in (jt.moco(NET, queue=4), jt.byol(NET)):
        jt.init(needs_no_others, optax.sgd(0.1), KEY, a_batch(1))


def test_a_peer_that_nothing_trains_is_refused():
    peer = NET.named("peer")
    lesson, own = jt.distillation(NET, jt.peer(peer)), jt.classification(NET)
    contrast = jt.crd(NET, jt.peer(peer), examples=9, dim=2, negatives=2)
    for objective in (lesson, own + lesson, 2.0 * (lesson + jt.l2()), own + contrast, own.named("o") + lesson + own):
        with pytest.raises(jt.InputError, match="'peer' teaches as a peer, but nothing here trains it"):
            jt.init(objective, optax.sgd(0.1), KEY, a_batch())
    other = jt.classification(peer).named("peer")
    back = jt.distillation(peer, jt.peer(NET)).named("back")
    for objective in (lesson + other, own + lesson + back, contrast + other, lesson.on("a") + other.on("b")):
        batch = a_batch()
        jt.init(objective, optax.sgd(0.1), KEY, {**batch, "a": a_batch(), "b": a_batch()})
