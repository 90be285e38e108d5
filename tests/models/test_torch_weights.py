"""Weights of PyTorch: every form that its users save, without and with PyTorch."""

import argparse
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxtransfer as jt

RULES = [("fc", "head")]
INPUTS = jax.ShapeDtypeStruct((1, 4), np.float32)
WEIGHT = np.arange(8, dtype=np.float32).reshape(2, 4) / 8  # as PyTorch lays it out, exact in bfloat16
BIAS = np.array([0.5, -2.0], np.float32)
PLAIN = {"fc.weight": WEIGHT, "fc.bias": BIAS}


@pytest.fixture
def linear():
    """A model of one linear layer, as plain functions."""

    def init(key, x):
        return {"params": {"head": {"kernel": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)}}}

    def apply(variables, x, *, train, key):
        head = variables["params"]["head"]
        return {"logits": x @ head["kernel"] + head["bias"]}, {}

    return jt.Model(init, apply, name="linear")


def check(model, weights):
    """Loads the weights and holds them against those that were written down."""
    head = jt.models.from_torch(model, weights, INPUTS, rules=RULES)["params"]["head"]
    np.testing.assert_array_equal(head["kernel"], WEIGHT.T)
    np.testing.assert_array_equal(head["bias"], BIAS)
    assert {leaf.dtype for leaf in head.values()} == {np.dtype(np.float32)}


def prefixed(prefix):
    """The weights under names with a prefix."""
    return {f"{prefix}{name}": value for name, value in PLAIN.items()}


FORMS = {
    "plain": PLAIN,
    "state_dict": {"state_dict": PLAIN, "epoch": 3},
    "model": {"model": PLAIN, "optimizer": {"state": {0: {"momentum": BIAS}}}, "epoch": 3, "args": None},
    "model, and an average of it": {"model_ema": prefixed("x."), "model": PLAIN},
    "another key": {"weights": PLAIN, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "two levels": {"model": {"state_dict": PLAIN}},
    "parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "parallel, then compiled": prefixed("_orig_mod.module."),
    "compiled, then parallel": prefixed("module._orig_mod."),
    "a compiled layer": {name.replace("fc.", "fc._orig_mod."): value for name, value in PLAIN.items()},
    "fully sharded": prefixed("_fsdp_wrapped_module."),
    "averaged": prefixed("module.") | {"n_averaged": np.array(7)},
    "half precision": {name: value.astype(ml_dtypes.bfloat16) for name, value in PLAIN.items()},
    "double precision": {name: value.astype(np.float64) for name, value in PLAIN.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_form_of_checkpoints(form, linear):
    check(linear, FORMS[form])


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"teacher": PLAIN, "student": PLAIN}, "expected one state dict in the weights, found 2 .teacher, student."),
        ({}, "found none; pass the one that is meant"),
        ({"epoch": 3}, "found none"),
        ({"model": 3}, "found none"),
        ({**PLAIN, "ema": PLAIN}, r"found 2 \(ema\); part='ema' takes that"),
        ({**PLAIN, 3: BIAS}, "expected the weights by name, got a tensor under 3"),
        ({**PLAIN, "module.fc.bias": BIAS}, "two tensors of the weights are 'fc.bias' once"),
        ([WEIGHT, BIAS], "expected weights by name, got list; pass a file or a dict"),
        (None, "expected weights by name, got NoneType"),
    ],
)
def test_what_holds_no_weights_is_told(weights, told, linear):
    with pytest.raises(jt.InputError, match=told):
        jt.models.from_torch(linear, weights, INPUTS, rules=RULES)


def test_kernels_of_any_rank():
    """Axes of PyTorch's [O, I, D, H, W] go to [D, H, W, I, O]; a cube would hide another order."""
    kernel = np.random.default_rng(0).normal(size=(5, 4, 3, 3, 3)).astype(np.float32)
    model = jt.Model(
        lambda key, x: {"params": {"conv": {"kernel": np.zeros((3, 3, 3, 4, 5), np.float32)}}},
        lambda variables, x, *, train, key: ({}, {}),
    )
    loaded = jt.models.from_torch(model, {"c.weight": kernel}, INPUTS, rules=[("c", "conv")])
    for place in np.ndindex(3, 3, 3):
        np.testing.assert_array_equal(loaded["params"]["conv"]["kernel"][place], kernel[(..., *place)].T)


class TestFiles:
    """What `torch.save` writes."""

    @pytest.fixture
    def save(self, tmp_path):
        """Writes something to a file, by PyTorch."""
        torch = pytest.importorskip("torch")

        def written(what):
            torch.save(what, tmp_path / "weights.pth")
            return tmp_path / "weights.pth"

        return written

    @pytest.fixture
    def tensors(self):
        """The weights as parameters of a network."""
        torch = pytest.importorskip("torch")
        return {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in PLAIN.items()}

    def test_forms(self, save, tensors, linear):
        options = argparse.Namespace(lr=0.1, names=["a"])
        scores = {"best": np.float64(0.5), "epoch": np.int64(3)}
        for saved in (
            tensors,
            {"model": tensors, "args": options, **scores},
            {name: value.detach().bfloat16() for name, value in tensors.items()},
            {f"_orig_mod.{name}": value.detach().half() for name, value in tensors.items()},
        ):
            check(linear, save(saved))
            check(linear, saved)

    def test_no_code_of_a_file_is_run(self, save, linear, tmp_path):
        class Planted:
            def __reduce__(self):
                return (open, (str(tmp_path / "planted"), "w"))

        with pytest.raises(jt.InputError, match=r"it holds Python objects besides tensors.*state_dict\(\)"):
            jt.models.from_torch(linear, save({"model": PLAIN, "more": Planted()}), INPUTS, rules=RULES)
        assert not (tmp_path / "planted").exists()

    def test_a_network_is_told_its_weights(self, linear):
        torch = pytest.importorskip("torch")
        with pytest.raises(jt.InputError, match=r"got Linear; pass its state_dict\(\)"):
            jt.models.from_torch(linear, torch.nn.Linear(4, 2), INPUTS, rules=RULES)

    def test_tensors_without_values_are_told(self, linear, tensors):
        torch = pytest.importorskip("torch")
        for wrong in (torch.zeros(2, device="meta"), torch.zeros(2).to_sparse()):
            with pytest.raises(jt.InputError, match=r"'fc.bias' of the weights has no plain values"):
                jt.models.from_torch(linear, {**tensors, "fc.bias": wrong}, INPUTS, rules=RULES)

    def test_files_of_other_things_are_told(self, save, linear, tmp_path):
        for what in (BIAS.tolist(), 3, {"epoch": 3}):
            with pytest.raises(jt.InputError, match="state dict"):
                jt.models.from_torch(linear, save(what), INPUTS, rules=RULES)
        (tmp_path / "plain.pkl").write_bytes(pickle.dumps(3))
        for path in (tmp_path, tmp_path / "none", tmp_path / "plain.pkl"):
            with pytest.raises(jt.InputError, match="cannot read the weights"):
                jt.models.from_torch(linear, path, INPUTS, rules=RULES)
