"""A trained run read back: the model that a run directory describes, with the weights that it reached."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtransfer import models
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.description import rebuild
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.resizing import STRETCH, Resizing, fit, from_entries
from jaxtransfer.runs import checkpoints
from jaxtransfer.runs.configuration import TASK_CLASSES, check_config, check_weights, known
from jaxtransfer.runs.deltas import DELTA, check_base_of, on_base
from jaxtransfer.runs.directory import read_config, steps_of
from jaxtransfer.runs.selection import score_of
from jaxtransfer.runs.table import kept_table
from jaxtransfer.runs.tokens import kept_tokenizer
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import Vocabulary
from jaxtransfer.weights import frozen

BEST, LAST = "best", "last"


class Preprocessing(NamedTuple):
    """What images become before the network sees them.

    Attributes:
      image_shape: (H, W, C) to which images are brought; None where the run doesn't say.
      mean: what its model normalises by, after a division by 255, per channel; None where it doesn't.
      std: likewise.
    """

    image_shape: tuple[int, int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


class Run(NamedTuple):
    """A trained run.

    Attributes:
      config: its configuration.
      model: its model; its inputs are images as they are, uint8, where it normalises them itself.
      params: its weights, by model name: the average's, where the run is its moving average.
      state: its batch statistics, by model name.
      step: the step they are of.
      result: what was evaluated at that step, by metric; empty where nothing was.
      directory: where it lies.
    """

    config: dict[str, Any]
    model: Model
    params: Any
    state: Any
    step: int
    result: Mapping[str, float] = {}
    directory: Path = Path()

    @property
    def variables(self) -> dict[str, Any]:
        """The model's weights and statistics: `run.model.apply(run.variables, images, train=False, key=None)`.

        A model with a frozen part wants `run.model.complete(run.variables)`.
        """
        return {"params": self.model.whole(self.params), **self.state.get(self.model.name, {})}

    @property
    def part(self) -> Model:
        """It as a model with nothing to train, a member of `jt.models.ensemble` say."""
        return frozen(self.model, self.variables).part

    @property
    def knows(self) -> tuple[str, ...]:
        """What it has learned: `classes`, `labels`, `features` (alone, without either), `episodes`, `tasks`.

        Of `labels` any number hold together: their probabilities are the sigmoids of the logits, not a softmax.
        """
        return tuple(known(self.config)["knows"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes, or labels: logit k is of class k; empty where the run doesn't say."""
        return tuple(self.config.get("class_names", ()))

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """The class names of each of its tasks, whose logits are the output of that name; empty of other runs."""
        return {task: tuple(names) for task, names in self.config.get(TASK_CLASSES, {}).items()}

    @property
    def preprocessing(self) -> Preprocessing:
        """What its images become before the network sees them."""
        entries = (self.config.get(name) for name in Preprocessing._fields)
        return Preprocessing(*(None if entry is None else tuple(entry) for entry in entries))

    @property
    def tokenizer(self) -> Tokenizer | Vocabulary | None:
        """What makes the tokens of its texts: `jt.data.load("table:...", tokens=, tokenizer=run.tokenizer)`.

        None where it is no run on texts.
        """
        return kept_tokenizer(self.directory, self.config)

    @property
    def table(self) -> dict[str, Any] | None:
        """How the rows of its table became columns, in JSON types: means, categories, class names.

        `jt.data.from_frame(new, like=run)` and `jt.data.load("table:...", "all", like=run)` make columns of other rows
        alike, in any process. None where it is no run on a table.
        """
        return kept_table(self.directory, self.config)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) to which images are brought; None where the run doesn't say."""
        return self.preprocessing.image_shape

    @property
    def resizing(self) -> Resizing:
        """How images are brought to that shape: as its weights expect it; stretched where the run doesn't say.

        `jt.data.load("folder:photos", "test", like=run)` gives a data set of images as this run takes them.
        """
        noted = self.config.get("preprocessing")
        return STRETCH if noted is None else from_entries(noted)

    def prepare(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Returns images of any sizes as the model takes them, uint8 [B, H, W, C]; it normalises them itself.

        Args:
          images: uint8 [h, w, C] each, grey, RGB or RGBA.

        Raises:
          InputError: where the run doesn't say which images it takes, and for what is no image.
        """
        if self.image_shape is None:
            raise InputError(f"{self.directory} doesn't say which images it takes; resize them yourself")
        prepared = []
        for image in map(np.asarray, images):
            if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape or image.shape[2] not in (1, 3, 4):
                raise InputError(f"expected images of type uint8 [H, W, C]; got {image.dtype} {image.shape}")
            prepared.append(fit(image, self.image_shape, self.resizing))
        return np.stack(prepared) if prepared else np.zeros((0, *self.image_shape), np.uint8)

    @property
    def finished(self) -> bool:
        """Whether it has made all steps that it was to make; one that stopped early, by its patience, has not."""
        return checkpoints.steps(self.directory / "checkpoints")[-1] >= steps_of(self.directory, self.config)

    def __repr__(self):
        """Without its weights: `Run(runs/a: small-cnn, 10 classes, step 300; accuracy 0.912, loss 0.31)`."""
        what = [self.config.get("model") or self.model.name, f"step {self.step}"]
        if self.class_names:
            what.insert(1, f"{len(self.class_names)} {LABELS if LABELS in self.knows else CLASSES}")
        if self.tasks:
            what.insert(1, f"tasks {', '.join(self.tasks)}")
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.result.items())
        return f"Run({self.directory}: {', '.join(what)}{'; ' * bool(told)}{told})"


def load_run(
    directory: str | Path,
    *,
    checkpoint: str | int = BEST,
    model: Any = None,
    average: bool | None = None,
    base: Any = None,
    needs: Sequence[str] = (),
) -> Run:
    """Reads a run: of the command line, or of `jt.fit(out=..., model=...)`.

    Args:
      directory: the run directory.
      checkpoint: `"best"`, by the metric that the run monitors (the newest where nothing was evaluated); `"last"`; or
        the number of a step that was kept. Of a damaged one the next is read, with a warning, unless it was named.
      model: what was trained, or `jt.ema` of it; only where it is not of the zoo, so that the run can't say how it was
        made.
      average: whether to read the moving average, `jt.ema`, of the model in place of the model; None as the run was
        noted: `fit(model=jt.ema(model))` says that the run is its average.
      base: of a run of a delta what it stands on: a run, its directory, or variables. By default it is looked for where
        the delta noted it. Deltas that are read with one run for a base hold it in memory once.
      needs: entries that its configuration must have.

    Returns:
      A `Run`: `model`, `variables`, `class_names`, `preprocessing`, `step`, `config` and `result`.

    Raises:
      InputError: where the directory is no run; has no checkpoint yet, or none that is whole; has a configuration that
        is not what a run writes, or that a later version wrote; holds weights of another model, or no average; is a
        delta whose base is not found, or is another one than it was trained on.
    """
    directory = Path(directory)
    config = known(read_config(directory))
    if given := model is not None:
        check_config(config, directory)
        if entries := getattr(model, "entries", ()):  # a moving average: it has a name and a model
            config, model, average = {**config, "average": entries[0]}, model.model, True
        if not isinstance(model, Model):
            raise InputError(f"load_run: model= is what was trained, a jt.Model; got a {type(model).__name__}")
        if DELTA in config:
            check_base_of(model, config[DELTA], directory)
    else:
        if config.get("model", "") is None:
            raise _not_described(directory)
        check_config(config, directory, needs=tuple(needs))
        if "model" not in config or not (config.get("class_names") or config.get("outputs")):
            raise _not_described(directory)
        model = rebuild(config)
        if DELTA in config:
            model = on_base(model, config[DELTA], directory, base, load_run)
    if base is not None and (given or DELTA not in config):
        raise InputError(f"load_run: base= is of a run of a delta that says what it is; {directory} is not read by one")
    found = _read(directory, checkpoint, score_of(config.get("monitor"), config.get("maximize", True)))
    params, state = (checkpoints.nested(found.leaves, part) for part in ("params", "state"))
    if model.shares is not None and not model.shares.own:  # a twin without parameters of its own; nothing is nothing
        params = {model.name: {}, **params}
    if any(one.name not in params for one in model.family):
        raise InputError(
            f"{directory} has trained {sorted(params)} and no model {model.name!r}; pass the one that was trained"
        )
    wanted = config.get("average") is not None if average is None else average
    if wanted:
        params, state = _averaged(params, state, model, config.get("average") or f"{model.name}_ema", directory)
    if config.get("heads") and not given:  # they belong to the method, and stay behind
        variables = models.encoder_of({"params": params[model.name], **state.get(model.name, {})})
        params, state = {model.name: variables.pop("params", {})}, {model.name: variables}
    check_weights(model, params, config, directory)
    result = {name.removeprefix("eval/"): value for name, value in found.meta.items() if name.startswith("eval/")}
    return Run(config, model, params, {model.name: {}, **state}, found.step, result, directory)


def _not_described(directory: Path) -> InputError:
    return InputError(
        f"{directory} doesn't say how its model is made: it is not of the zoo, or was trained without fit(model=). In "
        f"Python, pass it: jt.load_run(directory, model=...); the command line can't build it"
    )


def _read(directory: Path, checkpoint: str | int, score: Any) -> checkpoints.Restored:
    """Returns the checkpoint that was asked for; of a best or last one that is damaged the next."""
    folder, errors = directory / "checkpoints", []
    newest_first = checkpoints.steps(folder)[::-1]
    if not newest_first:
        raise InputError(f"{directory} has no checkpoint yet; run its command again to train it")
    if checkpoint in (BEST, LAST):
        best = checkpoints.best(folder, score) if checkpoint == BEST else None
        order = newest_first if best is None else [best, *(step for step in newest_first if step != best)]
    elif type(checkpoint) is int:
        return checkpoints.read(folder, checkpoint)
    else:
        raise InputError(f"checkpoint must be {BEST!r}, {LAST!r} or the number of a step; got {checkpoint!r}")
    for step in order:
        try:
            found = checkpoints.read(folder, step)
        except checkpoints.DamagedCheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            warnings.warn(f"{error}; step {step} is used", stacklevel=3)
        return found
    raise InputError(f"no checkpoint of {directory} is whole ({errors[0]}); run its command again to train it anew")


def _averaged(params: Any, state: Any, model: Model, name: str, directory: Path) -> tuple[Any, Any]:
    """Returns the average's weights, in the types of the model's own, and its statistics, by the model's name."""
    own = dict(state.get(name, {}))
    if "params" not in own:
        raise InputError(f"{directory} keeps no moving average {name!r} of its weights; its state has {sorted(state)}")
    means, narrow = own.pop("params"), model.whole(params)
    whole = jax.tree.map(lambda mean, leaf: np.asarray(mean).astype(leaf.dtype), means, narrow)
    return model.spread(params, whole), {**state, model.name: own}
