"""One line from somebody's weights to variables of a model, every tensor accounted for."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import models, tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.pretrained import fitting
from jaxtransfer.pretrained.adapt import channelwise
from jaxtransfer.pretrained.facts import Facts
from jaxtransfer.pretrained.match import Match, best_match, check_kinds
from jaxtransfer.pretrained.match import match as match_by
from jaxtransfer.pretrained.preprocessing import Preprocessing
from jaxtransfer.pretrained.report import WeightsReport
from jaxtransfer.pretrained.scheme import Scheme
from jaxtransfer.pretrained.schemes import SCHEMES
from jaxtransfer.pretrained.source import open_source
from jaxtransfer.pretrained.text_facts import POSITIONS, WORDS, cut, settled
from jaxtransfer.runs.load import Run
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import Vocabulary


class Pretrained(NamedTuple):
    """A model with somebody's weights.

    Attributes:
      variables: `{"params": ..., "batch_stats": ...}`, NumPy arrays in the model's types.
      report: what became of each tensor and of each leaf.
      model: the model over images as they are, uint8: it normalises by `preprocessing`, where that is known and the
        given model doesn't normalise already; a text encoder that pools as the weights do, where the given one leaves
        that open; else the given one.
      preprocessing: what the weights expect of images; None where nothing says it.
      class_names: of the outputs, where they are known and the head is the weights'.
      tokenizer: what makes tokens of texts, where the weights are a text encoder's and it stands beside them.
      labels: whether the outputs are of labels, any number of which hold together, by sigmoids.
    """

    variables: dict[str, Any]
    report: WeightsReport
    model: Model
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...]
    tokenizer: Tokenizer | Vocabulary | None = None
    labels: bool = False

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by model name: `jt.fit(..., params=loaded.params, state=loaded.state)`."""
        return {self.model.name: self.variables["params"]}

    @property
    def state(self) -> dict[str, Any]:
        """The batch statistics by model name."""
        return {self.model.name: {kind: value for kind, value in self.variables.items() if kind != "params"}}

    def __repr__(self):
        """Without its weights: the report's first line."""
        return f"Pretrained({self.model.name!r} from {str(self.report).partition(chr(10))[0]})"


def load_pretrained(
    source: str | Path | Mapping[str, Any] | Run,
    model: Model,
    *,
    inputs: Any = None,
    reinit: tree.Patterns = (),
    ignore: tree.Patterns = (),
    class_names: Sequence[str] = (),
    source_class_names: Sequence[str] = (),
    part: str | None = None,
    scheme: Scheme | None = None,
    key: Any = None,
) -> Pretrained:
    """Returns somebody's weights for a model: read, translated, checked, with what their images were prepared by.

    Which library they are of is told by their names. Nothing is left out or made up in silence: a tensor that has no
    place, a leaf that gets no value, or another shape is an error, unless `reinit` or `ignore` selects it. Where the
    inputs have another size or other channels, positions are interpolated and the stem is adapted, which the report
    tells. No code of a file is run.

        loaded = jt.load_pretrained("resnet18.pth", jt.models.resnet18(2), reinit="head")
        jt.fit(jt.classification(loaded.model), ..., params=loaded.params, state=loaded.state)

    Args:
      source: a file of `torch.save`, safetensors (an index of several too), `.npz`, ONNX; a folder with such a file; a
        run directory or a `Run`; `hf:owner/name` or `timm:name`, with `@revision` to pin it; or what is in one: a state
        dict, variables of ours.
      model: the network.
      inputs: a batch of inputs, or its shape (`jax.ShapeDtypeStruct`), to lay the variables out; None for one image of
        the size that the model's row of the zoo was made for.
      reinit: path patterns of leaves of the model that stay as initialised: a new head. What the source has there is
        left behind.
      ignore: patterns of names of the source's tensors that are left behind: `encoder_k`, `head_dist`. A pattern
        matches one or more whole words between dots.
      class_names: names of the model's outputs: each gets the weights' output of its name, those without are fresh.
      source_class_names: names of the weights' outputs, where nothing beside them says it.
      part: the key of the state dict that is meant, where a checkpoint has several: "teacher", "model_ema".
      scheme: the table of names, of `jaxtransfer.pretrained.SCHEMES` or your own; None finds it.
      key: for fresh leaves; `jax.random.key(0)` by default.

    Raises:
      InputError: where the source can't be read, or doesn't fit; the message names the scheme that is closest, and what
        it leaves over.
    """
    if not isinstance(model, Model):
        remedy = "jt.models.resnet18(classes) makes one"
        raise InputError(f"load_pretrained takes the jt.Model that the weights are for, got {model!r:.60}; {remedy}")
    found = open_source(source, part)
    inputs = fitting.shape_of(model, inputs)
    leaves = tree.leaves_by_path(dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), inputs)))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    texts, told = None, ()
    if WORDS in shapes:
        texts = found.texts()
        model, told = settled(model, texts, shapes, found.name)
    kept, ignored = fitting.without(found.tensors, ignore)
    matched = best_match(kept, shapes, SCHEMES) if scheme is None else match_by(kept, shapes, scheme)
    unsaid = fitting.check_heads(found, matched, shapes)
    check_kinds(matched, {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()})
    names = tuple(source_class_names) or found.facts.class_names
    size = found.facts.preprocessing.size if found.facts.preprocessing is not None else None
    fit = fitting.fit(matched, shapes, inputs, reinit, tuple(class_names), names, size)
    fitting.check(fit, matched, shapes, kept, found.name, _called(model))
    fitting.check_options(found, model)

    values = {path: np.array(fit.values[path], leaves[path].dtype) for path in leaves if path in fit.values}
    if fit.fresh or fit.columns:
        key = jax.random.key(0) if key is None else key
        drawn = tree.leaves_by_path(dict(model.init(key, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs))))
        values |= {path: np.array(drawn[path]) for path in fit.fresh}
        for path, columns in fit.columns.items():
            fitting.fill(values[path], np.asarray(drawn[path]), columns)
    preprocessing, tokenizer = None, None
    if texts is None:
        preprocessing, told = _preprocessing(found.facts, matched, shapes, model)
        if found.facts.network is None and model.recipe is not None:
            told = (*told, *filter(None, (matched.scheme.unsaid.get(model.recipe.build),)))
    elif texts.tokenizer is not None:
        tokenizer = cut(texts.tokenizer, shapes[POSITIONS][0])
        told = (*told, f"tokenizer: {tokenizer}")
    told = (*told, *unsaid)
    report = WeightsReport(
        found.name,
        matched.scheme.name + f" under {matched.prefix!r}" * bool(matched.prefix),
        {path: matched.names[path] for path in values if path not in fit.fresh},
        fit.adapted,
        fit.fresh,
        {**matched.left, **ignored, **fit.left},
        (*found.notes, *told),
    )
    fresh = any(tree.matches(path, model.head) for path in fit.fresh)
    ours, labels = tuple(class_names) or (() if fresh else names), found.facts.labels and not fresh
    variables = tree.nested({path: values[path] for path in leaves})
    return Pretrained(variables, report, _normalized(model, preprocessing), preprocessing, ours, tokenizer, labels)


def _preprocessing(
    facts: Facts, matched: Match, shapes: Mapping[str, tuple[int, ...]], model: Model
) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """Returns what images become, for the channels that the model's stem has, and whence that is known."""
    known = facts.preprocessing or _usual(matched.scheme, model)
    if known is None:
        return None, ("preprocessing: nothing says how images are prepared; normalise them as in the training",)
    where = facts.origin if facts.preprocessing is not None else f"usual for {matched.scheme.name}"
    notes = [f"preprocessing ({where}): {known}"]
    stem = next((shape for path, shape in shapes.items() if path.endswith("stem_conv/kernel")), None)
    if known.mean is not None and known.std is not None and stem is not None and len(known.mean) not in (1, stem[2]):
        mean, std = (channelwise(values, stem[2]) for values in (known.mean, known.std))
        known = Preprocessing(known.size, known.crop, mean, std, known.interpolation)
    recipe = model.recipe
    if known.mean is not None and recipe is not None and recipe.mean not in (None, list(known.mean)):
        notes.append(f"the model given normalises by {recipe.mean}, and is left so")
    return known, tuple(notes)


def _usual(scheme: Scheme, model: Model) -> Preprocessing | None:
    """Returns what the published weights of a scheme expect, where it depends on the network by its row of the zoo."""
    known, described = scheme.preprocessing, models.describe(model)
    if known is None or not scheme.sized or described is None:
        return known
    height, width, _ = models.ZOO[described["model"]].image
    return dataclasses.replace(known, size=(height, width))


def _called(model: Model) -> str:
    """Returns the model's name in the zoo, where it is one of it as it stands there; else its own."""
    described = models.describe(model)
    return model.name if described is None or described.get("model_options") else described["model"]


def _normalized(model: Model, preprocessing: Preprocessing | None) -> Model:
    already = model.recipe is not None and model.recipe.mean is not None
    if already or preprocessing is None or preprocessing.mean is None:
        return model
    return models.normalize(model, preprocessing.mean, preprocessing.std)
