"""A text encoder of the BERT family in loops of NumPy, float64, that reads weights by their names in transformers."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def weights(*, width=8, depth=2, hidden=12, words=20, positions=10, types=2, pooler=True, classes=3, seed=0):
    """A state dict of BertForSequenceClassification, drawn lively; of BertModel without classes."""
    rng = np.random.default_rng(seed)
    start, out = "bert." * bool(classes), {}

    def linear(name, rows, columns):
        out[f"{name}.weight"] = rng.normal(0, columns**-0.5, (rows, columns))
        out[f"{name}.bias"] = rng.normal(0, 0.3, rows)

    def norm(name):
        out[f"{name}.weight"] = rng.uniform(0.5, 1.5, width)
        out[f"{name}.bias"] = rng.normal(0, 0.3, width)

    for name, rows in (("word", words), ("position", positions), ("token_type", types)):
        out[f"{start}embeddings.{name}_embeddings.weight"] = rng.normal(size=(rows, width))
    norm(f"{start}embeddings.LayerNorm")
    for number in range(depth):
        layer = f"{start}encoder.layer.{number}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", width, width)
        linear(f"{layer}.attention.output.dense", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", hidden, width)
        linear(f"{layer}.output.dense", width, hidden)
        norm(f"{layer}.output.LayerNorm")
    if pooler:
        linear(f"{start}pooler.dense", width, width)
    if classes:
        linear("classifier", classes, width)
    return out


def distilled(bert):
    """The same weights under DistilBERT's names, which has no types: they are in the words already."""
    names = {
        "bert.": "distilbert.",
        "encoder.layer": "transformer.layer",
        "attention.output.LayerNorm": "sa_layer_norm",
        "attention.output.dense": "attention.out_lin",
        **{f"self.{name}": f"{name[0]}_lin" for name in ("query", "key", "value")},
        "intermediate.dense": "ffn.lin1",
        ".output.dense": ".ffn.lin2",
        ".output.LayerNorm": ".output_layer_norm",
        "pooler.dense": "pre_classifier",
    }
    out = {}
    for name, value in bert.items():
        for old, new in names.items():
            name = name.replace(old, new)
        out[name.replace("distilbert.pre_", "pre_")] = value
    kinds = out.pop("distilbert.embeddings.token_type_embeddings.weight")
    out["distilbert.embeddings.word_embeddings.weight"] = out["distilbert.embeddings.word_embeddings.weight"] + kinds[0]
    return out


def norm(x, scale, bias):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-12) * scale + bias


def encode(w, tokens, mask, types=None, *, heads, start="bert."):
    """What each layer gives for one text: a list of [T, D], that of the embeddings first."""
    tables = {kind: w[f"{start}embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")}
    types = [0] * len(tokens) if types is None else types
    linear = lambda name, x: w[f"{name}.weight"] @ x + w[f"{name}.bias"]  # noqa: E731
    x = [tables["word"][t] + tables["position"][i] + tables["token_type"][types[i]] for i, t in enumerate(tokens)]
    x = [norm(row, *(w[f"{start}embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias"))) for row in x]
    layers, depth = [np.array(x)], sum(name.endswith("intermediate.dense.bias") for name in w)
    for number in range(depth):
        layer, after = f"{start}encoder.layer.{number}", []
        q, k, v = (
            [linear(f"{layer}.attention.self.{name}", row).reshape(heads, -1) for row in x]
            for name in ("query", "key", "value")
        )
        for i, row in enumerate(x):
            found = np.zeros_like(q[0])
            for h in range(heads):
                scores = [q[i][h] @ k[j][h] / math.sqrt(q[i].shape[1]) for j in range(len(x))]
                shares = np.exp(scores) * np.asarray(mask, float)
                found[h] = sum(s * v[j][h] for j, s in enumerate(shares / shares.sum()))
            y = linear(f"{layer}.attention.output.dense", found.reshape(-1))
            y = norm(row + y, *(w[f"{layer}.attention.output.LayerNorm.{kind}"] for kind in ("weight", "bias")))
            z = linear(f"{layer}.intermediate.dense", y)
            z = linear(f"{layer}.output.dense", z * 0.5 * (1 + erf(z / math.sqrt(2))))
            after.append(norm(y + z, *(w[f"{layer}.output.LayerNorm.{kind}"] for kind in ("weight", "bias"))))
        x = after
        layers.append(np.array(x))
    return layers
