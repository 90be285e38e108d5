"""Adapters in the layout of Hugging Face's peft: files written by hand against matrices in NumPy, and peft itself."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.formats import safetensors
from jaxtransfer.formats.read import read_file
from jaxtransfer.pretrained.peft_kinds import torch_permutation

D = jt.deltas
OLD = {
    "query": "vit.encoder.layer.0.attention.attention.query",
    "out": "vit.encoder.layer.0.attention.output.dense",
    "fc2": "vit.encoder.layer.0.output.dense",
}
NEW = {
    "query": "vit.layers.0.attention.q_proj",
    "out": "vit.layers.0.attention.o_proj",
    "fc2": "vit.layers.0.mlp.fc2",
}
PATCHES = "vit.embeddings.patch_embeddings.projection"
RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def base():
    """A transformer of width 8 with two heads on images 4×4×3, at random weights."""
    model = jt.models.vit(8, 1, 2, 3, patch=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))
    return model, jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), dict(shapes))


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def written(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    tensors = {f"base_model.model.{name}": value for name, value in tensors.items()}
    safetensors.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def change(found, base, path):
    """What a delta adds to a parameter of the base."""
    variables = base[1]
    before, after = variables["params"], D.merged(found.model, found.variables)["params"]
    for key in path.split("/"):
        before, after = before[key], after[key]
    return np.asarray(after, np.float64) - before


@pytest.mark.parametrize("names", [OLD, NEW], ids=["old names", "new names"])
def test_lora_is_read_by_the_names_of_the_library(base, tmp_path, names):
    a, b = {name: drawn(2, 32 if name == "fc2" else 8) for name in names}, {name: drawn(8, 2) for name in names}
    tensors = {f"{names[name]}.lora_A.weight": a[name] for name in names}
    tensors |= {f"{names[name]}.lora_B.weight": b[name] for name in names}
    conv = drawn(2, 3, 2, 2), drawn(8, 2, 1, 1)
    tensors |= {f"{PATCHES}.lora_A.weight": conv[0], f"{PATCHES}.lora_B.weight": conv[1]}
    found = jt.load_peft(written(tmp_path / "a", {"r": 2, "lora_alpha": 3}, tensors), *base)
    for name, shape in {"query": (8, 2, 4), "out": (2, 4, 8), "fc2": (32, 8)}.items():
        place = "stage1/fc2/kernel" if name == "fc2" else f"stage1/attention/{name}/kernel"
        expected = (1.5 * b[name] @ a[name]).T.reshape(shape)
        np.testing.assert_allclose(change(found, base, place), expected, rtol=1e-5, atol=1e-5)
    expected = 1.5 * np.einsum("or,rchw->hwco", conv[1][:, :, 0, 0], conv[0])
    np.testing.assert_allclose(change(found, base, "stem_conv/kernel"), expected, rtol=1e-5, atol=1e-5)
    assert not np.any(change(found, base, "stage1/attention/value/kernel"))


def test_ranks_scales_whole_layers_and_biases(base, tmp_path):
    a, b, c, d = drawn(2, 8), drawn(8, 2), drawn(3, 8), drawn(8, 3)
    weight, bias, own = drawn(3, 8), drawn(3), drawn(8)
    value = "vit.layers.0.attention.v_proj"
    tensors = {
        **{f"{NEW['query']}.lora_A.weight": a, f"{NEW['query']}.lora_B.weight": b},
        **{f"{value}.lora_A.weight": c, f"{value}.lora_B.weight": d},
        **{"classifier.weight": weight, "classifier.bias": bias, f"{value}.base_layer.bias": own},
    }
    config = {"r": 2, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"v_proj": 6}, "modules_to_save": ["x"]}
    found = jt.load_peft(written(tmp_path / "a", config, tensors), *base)
    query, values = (change(found, base, f"stage1/attention/{name}/kernel") for name in ("query", "value"))
    np.testing.assert_allclose(query, (4 / 2**0.5 * b @ a).T.reshape(8, 2, 4), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values, (6 / 3**0.5 * d @ c).T.reshape(8, 2, 4), rtol=1e-4, atol=1e-5)
    after = D.merged(found.model, found.variables)["params"]
    np.testing.assert_allclose(after["head"]["kernel"], weight.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["head"]["bias"], bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["stage1"]["attention"]["value"]["bias"], own.reshape(2, 4), rtol=1e-5, atol=1e-6)


def test_a_fused_kernel_becomes_three(base, tmp_path):
    a, b, m = drawn(2, 8), drawn(24, 2), np.abs(drawn(24))
    names = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": m}
    tensors = {f"blocks.0.attn.qkv.{name}": value for name, value in names.items()}
    found = jt.load_peft(written(tmp_path / "a", {"lora_alpha": 2, "use_dora": True}, tensors), *base)
    own = base[1]["params"]["stage1"]["attention"]
    whole = np.concatenate([own[name]["kernel"].reshape(8, 8).T for name in ("query", "key", "value")]) + b @ a
    whole *= (m / np.linalg.norm(whole, axis=1))[:, None]
    after = D.merged(found.model, found.variables)["params"]["stage1"]["attention"]
    for name, third in zip(("query", "key", "value"), np.split(whole, 3), strict=True):
        np.testing.assert_allclose(after[name]["kernel"].reshape(8, 8), third.T, rtol=1e-4, atol=1e-5)
    tensors = {"blocks.0.attn.qkv.ia3_l": drawn(24, 1)}
    with pytest.raises(jt.InputError, match="does not split into three"):
        jt.load_peft(written(tmp_path / "b", {"peft_type": "IA3"}, tensors), *base)


PARTS = {
    "lora": D.lora(2, alpha=3),
    "rank-stabilised PiSSA": D.lora(2, alpha=3, rank_stabilized=True, start=D.pissa),
    "dora": D.dora(2, alpha=5),
    "ada_lora": D.ada_lora(2, alpha=3, dropout=0.1),
    "ia3": D.ia3(feedforward="fc2").on("(key|value|fc2)/kernel"),
    "vera": D.vera(3),
    "lo_ha": D.lo_ha(2, alpha=3),
    "lo_ha tucker": D.lo_ha(2, alpha=3, tucker=True).on("(stem_conv|fc1)/kernel"),
    "lo_kr": D.lo_kr(1, alpha=3, both=True),
    "lo_kr tucker": D.lo_kr(1, alpha=3, tucker=True).on("(stem_conv|fc1)/kernel"),
    "dropout": D.lora(2, alpha=3, dropout=0.25),
    "oft": D.oft(4, terms=5),
    "boft": D.boft(4),
    "embeddings and a head": D.chain(low=D.lora(1).on("fc1"), whole=D.full().on("head")),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_written_is_read_back(base, tmp_path, name):
    part = PARTS[name]
    bare = part.only is None and "head" not in name
    net = D.delta(base[0], base[1], part.on("(query|value|fc1)/kernel") if bare else part)
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    params = jax.tree.map(lambda leaf: 0.3 * drawn(*leaf.shape), shapes)
    folder = jt.save_peft(tmp_path / "out", net, {"params": params})
    assert all(key.startswith("base_model.") for key in read_file(folder / "adapter_model.safetensors"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert all(target.startswith(("vit.layers.0.", PATCHES)) for target in config["target_modules"])
    assert config.get("lora_dropout", 0) == {"dropout": 0.25, "ada_lora": 0.1}.get(name, 0)
    found = jt.load_peft(folder, *base)
    assert (found.model.part.drop is not None) == (name in ("dropout", "ada_lora"))
    one, other = D.merged(net, {"params": params})["params"], D.merged(found.model, found.variables)["params"]
    moved = 0.0
    for a, b, before in zip(*map(jax.tree.leaves, (one, other, base[1]["params"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        moved = max(moved, np.abs(np.asarray(a) - before).max())
    assert moved > 0.01


def test_lengths_of_embeddings_are_written_too(tmp_path):
    """DoRA over words: without its lengths peft took those of the base, and gave other outputs."""
    model = jt.models.text_encoder(2, width=4, depth=1, heads=1, vocabulary=9, positions=5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 5), np.int32))
    variables = jax.tree.map(lambda leaf: drawn(*leaf.shape), dict(shapes))
    net = D.delta(model, variables, D.dora(2, alpha=3).on("stem_(words|types)"))
    low = {"a": drawn(9, 2), "b": drawn(2, 4), "m": np.abs(drawn(4))}
    params = {"stem_words": {"embedding": low}, "stem_types": {"embedding": {**low, "a": drawn(2, 2)}}}
    folder = jt.save_peft(tmp_path / "out", net, {"params": params})
    tensors = read_file(folder / "adapter_model.safetensors")
    name = "base_model.model.bert.embeddings.word_embeddings"
    np.testing.assert_array_equal(tensors[f"{name}.lora_magnitude_vector"], low["m"])
    np.testing.assert_array_equal(tensors[f"{name}.lora_embedding_A"], low["a"].T)
    found = jt.load_peft(folder, model, variables)
    for a, b in zip(*map(jax.tree.leaves, (found.variables["params"], params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_no_adapter_of_this_network_is_one_line(base, tmp_path):
    def refused(told, config, tensors):
        folder = written(tmp_path / str(len(list(tmp_path.iterdir()))), config, tensors)
        with pytest.raises(jt.InputError, match=told):
            jt.load_peft(folder, *base)

    good = {f"{NEW['query']}.lora_A.weight": drawn(2, 8), f"{NEW['query']}.lora_B.weight": drawn(8, 2)}
    refused("unknown peft_type 'LORRA'.*LORA", {"peft_type": "LORRA"}, good)
    refused("fan_in_fan_out", {"fan_in_fan_out": True}, good)
    refused("a variant of LoRA, use_qalora", {"use_qalora": True}, good)
    refused("'pissa_niter_4', changed and nothing tells again", {"init_lora_weights": "pissa_niter_4"}, good)
    refused("'transformer.wte'", {}, {**good, "transformer.wte.lora_A.weight": drawn(2, 8)})
    refused("a form of adapter that is not known", {}, {**good, f"{NEW['query']}.lora_B.bias": drawn(8)})
    refused("holds 'classifier.bias' .5., and the model has .3.", {}, {**good, "classifier.bias": drawn(5)})
    refused("not those of this delta", {}, {**good, f"{NEW['query']}.lora_B.weight": drawn(9, 2)})
    refused("holds no adapter", {}, {})
    vera = {f"{NEW['query']}.vera_lambda_d": drawn(2), f"{NEW['query']}.vera_lambda_b": drawn(8)}
    refused("save_projection=True", {"peft_type": "VERA"}, vera)
    refused("coft", {"peft_type": "OFT", "coft": True}, {f"{NEW['query']}.oft_R.weight": drawn(2, 6)})
    with pytest.raises(jt.InputError, match="expected a folder of peft's"):
        jt.load_peft(tmp_path / "nowhere", *base)


def test_what_peft_has_no_form_for_is_one_line(base, tmp_path):
    def refused(told, part, scheme="huggingface"):
        net = D.delta(base[0], base[1], part)
        variables = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))
        params = jax.tree.map(lambda leaf: drawn(*leaf.shape), variables["params"])
        with pytest.raises(jt.InputError, match=told):
            jt.save_peft(tmp_path / "out", net, {"params": params}, scheme=scheme)

    refused("no form for a delta 'ssf'", D.ssf())
    refused("two parts change", D.chain(a=D.lora(1).on("fc1"), b=D.lora(1).on("fc1")))
    refused("of two kinds", D.chain(a=D.lora(1).on("fc1"), b=D.lo_ha(1).on("fc2")))
    refused("whole layers alone", D.full().on("head"))
    refused("'head/bias' is not trained", D.chain(a=D.lora(1).on("fc1"), b=D.full().on("head/kernel")))
    refused("can't say how it was made", D.fourier_ft(3, places=lambda o, i: np.arange(3)).on("fc1"))
    refused("no module whose weight is 'stage1/attention/query/kernel'", D.lora(1).on("query"), "timm")
    refused("unknown scheme 'hf'", D.lora(1).on("fc1"), "hf")
    with pytest.raises(jt.InputError, match="takes a delta of weights"):
        jt.save_peft(tmp_path / "out", base[0], base[1])


def test_places_of_a_spectrum_are_torchs():
    # torch.randperm(12, generator=torch.Generator().manual_seed(777)), and of seed 3
    np.testing.assert_array_equal(torch_permutation(12, 12, 777), TORCH[777])
    np.testing.assert_array_equal(torch_permutation(12, 5, 3), TORCH[3][:5])


TORCH = {777: [11, 7, 3, 8, 0, 2, 9, 6, 4, 10, 5, 1], 3: [10, 9, 1, 6, 4, 11, 3, 7, 2, 0, 8, 5]}
PYTHON = os.environ.get("PEFT_PYTHON", sys.executable)


def peft_in(folder, script):
    """Has peft make adapters in a folder; returns what runs the script again."""
    probe = subprocess.run([PYTHON, "-c", "import peft, transformers"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no peft: PEFT_PYTHON=/path/to/python with peft, torch and transformers")
    words = [PYTHON, os.path.join(os.path.dirname(__file__), script)]

    def run(what):
        subprocess.run([*words, what, folder], check=True, capture_output=True)

    run("make")
    return run


def assert_both_ways(folder, base, x, run_peft, kinds, unwritten):
    """What peft made gives its outputs here, and what we write of it gives them there."""
    run = jax.jit(lambda v: base.model.apply(v, x, train=False, key=None)[0]["logits"])
    found = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    assert len(found) == kinds
    before = np.load(folder / "base.npy")
    np.testing.assert_allclose(run(base.variables), before, atol=1e-6)
    for kind in found:
        delta = jt.load_peft(folder / kind, base.model, base.variables)
        expected = np.load(folder / f"{kind}.npy")
        assert np.abs(expected - before).max() > 1e-4, kind
        np.testing.assert_allclose(run(D.merged(delta.model, delta.variables)), expected, atol=1e-6, err_msg=kind)
        if kind not in unwritten:
            jt.save_peft(folder / "ours" / kind, delta.model, delta.variables)
    run_peft("read")
    for kind in set(found) - set(unwritten):
        given, expected = np.load(folder / "ours" / f"{kind}.npy"), np.load(folder / f"{kind}.npy")
        np.testing.assert_allclose(given, expected, atol=1e-6, err_msg=kind)


@pytest.mark.slow
def test_peft_itself(tmp_path):
    """Adapters that peft made give its outputs here; ours give ours there. PEFT_PYTHON names a Python with peft."""
    again = peft_in(tmp_path, "peft_reference.py")
    x = np.load(tmp_path / "x.npy").transpose(0, 2, 3, 1)
    base = jt.load_pretrained(tmp_path / "base", jt.models.vit(8, 2, 2, 3, patch=4), inputs=x)
    # Single biases, and places of an own choice, are not written.
    assert_both_ways(tmp_path, base, x, again, 15, ("ranks", "fourierft"))


@pytest.mark.slow
def test_peft_itself_on_texts(tmp_path):
    """Likewise of a BERT, its embeddings too."""
    again = peft_in(tmp_path, "peft_text_reference.py")
    x = {name: value.astype(np.int32) for name, value in np.load(tmp_path / "x.npz").items()}
    sizes = {"width": 8, "depth": 2, "heads": 2, "hidden": 32, "vocabulary": 30, "positions": 12, "pooler": "tanh"}
    base = jt.load_pretrained(tmp_path / "base", jt.models.text_encoder(3, **sizes), inputs=x)
    assert_both_ways(tmp_path, base, x, again, 12, ("biases", "fourierft"))
