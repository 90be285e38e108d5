"""Deltas on CIFAR-100 in the tiny form: rates are chosen off the test set, all begin as the probe, cells are kept."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from experiments import delta_methods, delta_table, deltas_cifar100
from experiments.delta_methods import GRID, METHODS, Kit, started
from experiments.deltas_cifar100 import Bench, Experiment, falling, settled

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def bench(tmp_path):
    return Bench(settled(Experiment(out=tmp_path, tiny=True)))


def test_rates_are_chosen_on_labels_held_out(bench, monkeypatch):
    """The best of the grid, further than the first three where that is at their end; each is trained once."""
    seen = []

    def fit(method, rows, test, rate, steps, seed, out):
        seen.append((rows, test, rate, steps, out))
        return {"accuracy": {3e-3: 50.0, 1e-2: 50.0}.get(rate, 50.0 - GRID.index(rate) if rate > 1e-2 else 1.0)}

    monkeypatch.setattr(bench, "fit", fit)
    rate, accuracies = bench.choose("lora", 5)
    assert rate == 3e-3
    assert list(accuracies) == ["0.0003", "0.001", "0.003", "0.01"]
    assert [one[2] for one in seen] == [1e-3, 3e-4, 3e-3, 1e-2]
    assert {(one[3], one[4]) for one in seen} == {(1, None)}
    rows = bench.rows(5, 0)
    assert rows.shape == (10, 5)
    assert np.array_equal(bench.train.labels[rows], np.repeat(np.arange(10), 5).reshape(10, 5))
    fitted, held = seen[0][:2]
    np.testing.assert_array_equal(fitted, rows[:, :4])
    left = np.sort(rows[:, 4])
    np.testing.assert_array_equal(held.read(np.arange(10))["image"], bench.train.read(left)["image"])
    assert bench.choose("lora", 5) == (rate, accuracies)
    assert len(seen) == 4, "a run was trained again"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet8", pytest.param("vit-ti", marks=pytest.mark.slow)])
def test_all_begin_as_the_probe(rng, model):
    """In inference mode each method gives the probe's logits, but for prompts; the head is among what trains."""
    network = jt.models.cifar_resnet(8, 5) if model == "resnet8" else jt.models.vit(8, 1, 2, 5, patch=4)
    image = rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    net = jt.models.normalize(network, 0.5, 0.25)
    variables = dict(net.init(jax.random.key(1), image))
    expected = net.apply(variables, image, train=False, key=None)[0]["logits"]
    kit = Kit(net, variables, 5, 1, 2, image)
    counts = {}
    for method in METHODS:
        if method in ("linear-probe", "vpt") and model == "resnet8":
            continue
        own, start = started(method, kit, 3)
        logits = own.apply(own.complete(start), image, train=False, key=None)[0]["logits"]
        far = np.abs(np.asarray(logits) - expected).max()
        assert (far > 1e-4) if method == "vpt" else (far < 1e-5), method
        counts[method] = jt.tree.count(start["params"])
        assert any("head" in path for path in jt.tree.leaves_by_path(start["params"])), method
    head = jt.tree.count(variables["params"]["head"])
    assert counts["full"] == jt.tree.count(variables["params"])
    if model == "resnet8":
        norms = 16 + 2 * (16 + 32 + 64)  # biases of the stem and of two layers in each stage
        assert counts["bitfit"] == norms + head
        outputs = 2 * (16 + 32 + 64)
        assert counts["ia3"] == outputs + head
        lora = sum(9 * i + o for i, o in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)))
        assert counts["lora"] == lora + head
        assert counts["dora"] == lora + outputs + head
    else:
        assert counts["lora"] == 2 * (8 + 8) + head
        assert counts["vpt"] == 10 * 8 + head


def test_the_rate_falls_along_a_cosine():
    transform = optax.chain(falling(0.4, 4))
    state = transform.init({"w": np.zeros(2)})
    for step in range(6):
        updates, state = transform.update({"w": np.array([1.0, -2.0])}, state)
        factor = 0.2 * (1 + np.cos(np.pi * min(step, 4) / 4))
        np.testing.assert_allclose(updates["w"], [-factor, 2 * factor], atol=1e-7)


def _results():
    def one(accuracy, share, rate=0.01):
        return {"accuracy": accuracy, "trained": int(1000 * share), "share": share, "rate": rate, "seconds": 3.0}

    probe = {key: value for key, value in one(20.0, 0.5).items() if key != "rate"}
    return {
        "10": {
            "linear-probe": {"0": probe},
            "full": {"0": one(30.0, 100.0, 0.001), "1": one(32.0, 100.0, 0.001)},
            "bitfit": {"0": one(30.4, 1.0), "1": one(30.0, 1.0)},
            "adapters": {"0": one(32.0, 11.0)},
            "ssf": {"0": one(31.5, 4.0)},
            "ia3": {"0": one(29.9, 2.0)},
            "lora": {},
        },
        "100": {"bitfit": {"0": one(40.0, 1.0)}},
    }


def test_what_the_table_says():
    header, rows = delta_table.table_of(_results())
    by_size = [name for size in (10, 100) for name in (f"{size} per class", "rate", "seconds")]
    assert header == ["method", "trained", "share, %", *by_size]
    assert rows[0] == ["linear-probe", "500", "0.50", "20.00", "", "3", "", "", ""]
    assert rows[1] == ["full", "100,000", "100.00", "31.00 (30.00, 32.00)", "0.001", "3", "", "", ""]
    assert rows[2] == ["bitfit", "1,000", "1.00", "30.20 (30.40, 30.00)", "0.01", "3", "40.00", "0.01", "3"]
    assert rows[-1] == ["lora", *[""] * 8]
    (line,) = delta_table.verdict(_results())
    assert line == (
        "10 labels per class: full 31.00; at most 5 % of the parameters and within 1 point or ahead: bitfit, ssf; "
        "ahead of it: adapters, ssf"
    )


@pytest.mark.slow
def test_it_runs_and_resumes(tmp_path, capsys, monkeypatch):
    def fit(self, method, rows, test, rate, steps, seed, out):
        assert method == "vpt"
        return original(self, method, rows, test, rate, steps, seed, out) if out else {"accuracy": rate}

    original = Bench.fit
    monkeypatch.setattr(Bench, "fit", fit)  # the choice of the rate has a test of its own
    tiny = Experiment(out=tmp_path, tiny=True, model="vit-ti", methods=("linear-probe", "vpt"))
    results = deltas_cifar100.main(tiny)
    (found,) = results["5"]["vpt"].values()
    assert 0 <= found["accuracy"] <= 100
    assert found["trained"] == 10 * 8 + 9 * 10
    assert found["share"] == pytest.approx(100 * found["trained"] / _size_of_vit())
    assert found["rate"] == GRID[-1]
    assert "vpt" in capsys.readouterr().out
    page = (tmp_path / "report.md").read_text()
    assert all(f"| {method} |" in page for method in tiny.methods)
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    monkeypatch.setattr(Bench, "fit", None)
    assert deltas_cifar100.main(tiny) == results
    with pytest.raises(jt.InputError, match="other settings"):
        deltas_cifar100.main(dataclasses.replace(tiny, bottleneck=3))


@pytest.mark.slow
def test_the_transformer_has_a_head_of_the_new_classes(tmp_path, monkeypatch):
    def load(self, name, part):
        found = original(self, name, part)
        halves = jt.data.Dataset.from_arrays(found.column("image"), found.labels // 2)
        return halves if name == self.experiment.data else found

    original = Bench._load
    monkeypatch.setattr(Bench, "_load", load)
    tiny = deltas_cifar100.settled(Experiment(out=tmp_path, tiny=True, model="vit-ti"))
    model, variables = Bench(tiny).source
    assert variables["params"]["head"]["kernel"].shape == (8, 5)
    learned = jt.tree.leaves_by_path(variables["params"])
    start = jt.tree.leaves_by_path(model.init(jax.random.key(7), np.zeros((1, 8, 8, 3), np.uint8))["params"])
    moved = {path.rpartition("/")[0] for path, leaf in learned.items() if np.any(leaf != start[path])}
    assert {"query", "value", "fc1", "fc2"} <= {path.rpartition("/")[2] for path in moved}  # it is the trained one


def _size_of_vit():
    width, tokens = 8, 5
    norms, attention, mlp = 3 * 2 * width, 4 * (width * width + width), 8 * width * width + 5 * width
    return (4 * 4 * 3 * width + width) + width + tokens * width + norms + attention + mlp + (width + 1) * 10


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet56", "vit-ti"])
def test_every_method_runs(tmp_path, monkeypatch, model):
    monkeypatch.setattr(Bench, "choose", lambda self, method, size: (1e-3, {}))  # one program for each method
    results = deltas_cifar100.main(Experiment(out=tmp_path, tiny=True, model=model))
    fitting = [method for method in delta_methods.METHODS if model == "vit-ti" or method != "vpt"]
    assert list(results["5"]) == fitting
    assert all(0 <= by_seed["0"]["accuracy"] <= 100 for by_seed in results["5"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("lor",)}, "did you mean 'lora'"),
        ({"methods": ("vpt",)}, "--model vit-ti; got resnet56"),
        ({"model": "vgg"}, "resnet56 say, or vit-ti; got vgg"),
        ({"tiny": False}, "--weights"),
        ({"tiny": False, "weights": "x", "steps": (1,)}, "--steps has one positive number for each"),
        ({"tiny": False, "weights": "x", "choose_steps": (1, 0)}, "--choose-steps has one positive number"),
        ({"tiny": False, "weights": "x", "labels": (1, 10)}, "--labels are 2 or more"),
        ({"rank": 0, "tiny": False, "weights": "x"}, "--rank must be positive; got 0"),
        ({"seeds": 0}, "--seeds must be positive"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(jt.InputError, match=message):
        deltas_cifar100.main(Experiment(**{"out": tmp_path / "out", "tiny": True, **changes}))
    assert not (tmp_path / "out").exists()
