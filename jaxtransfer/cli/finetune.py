"""`jaxtransfer finetune`: move what a run has learned to another data set."""

import dataclasses
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.classes import places_in, with_classes_of
from jaxtransfer.cli.delta_options import DeltaOptions, check_is_base, say_counts
from jaxtransfer.cli.freezing import FreezeOptions
from jaxtransfer.cli.image_options import ImageOptions, noted
from jaxtransfer.cli.options import DataOptions, TrainOptions, at_least, config_of, positive
from jaxtransfer.cli.recipe import RecipeOptions
from jaxtransfer.cli.registry.finetuning import METHODS, Ingredients, strength_of, strengths
from jaxtransfer.cli.registry.row import choices, row_of
from jaxtransfer.cli.runs import Run, architecture, build_model, check_fits, check_knows_classes
from jaxtransfer.cli.seeds import check_seeds, run_each
from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.sources import network_of, read_source
from jaxtransfer.cli.stages import train_stages
from jaxtransfer.cli.validation import load_sets
from jaxtransfer.errors import InputError
from jaxtransfer.runs.configuration import CLASSES
from jaxtransfer.runs.deltas import DELTA


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Start from pretrained weights and train on another data set.

    Example: jaxtransfer finetune --from runs/a --data digits/noisy --out runs/b
    """

    source: Annotated[str, tyro.conf.arg(name="from", metavar="SOURCE")]
    """What to start from: a run directory (its best checkpoint), a file or folder of weights (PyTorch, safetensors,
    .npz, ONNX), hf:owner/name or timm:name, with @revision to pin it."""
    data: DataOptions
    training: TrainOptions
    recipe: RecipeOptions
    frozen: FreezeOptions
    difference: DeltaOptions
    method: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(METHODS))] = "full"
    """How to move the weights. Frozen ones run in inference mode: batch norm by its running statistics, which stay,
    and no dropout.
    """
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the source says)")] = None
    """Network that weights of a file are of, where its name doesn't tell; `jaxtransfer models` lists them."""
    head_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: --lr)")] = None
    """Peak learning rate of the head, a new one's say, where it differs from that of the body."""
    strength: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=strengths())] = None
    """Of the penalty that holds the model near the source, or of bss."""
    head_strength: float = 0.01
    """Of the decay of a new head under l2-sp, l2-sp-fisher and delta."""
    keep_head: bool = False
    """Keep the source's head for the classes of the same names; otherwise a new one starts afresh."""
    resize: bool = False
    """Bring the images to the source's shape: size, and grey or colour; done anyway where its weights say how."""
    images: ImageOptions = dataclasses.field(default_factory=ImageOptions)

    def run(self) -> None:
        """Trains, or resumes, or says that it is done."""
        self.training.check()
        self.recipe.check()
        check_seeds(self.training, self.recipe.seeds)
        self.frozen.check()
        self._check_delta()
        row = row_of("method", self.method, METHODS)
        at_least(self, 0, "head_strength", *(["strength"] if self.strength is not None else []))
        positive(self, "head_rate")
        self.images.check()
        network = network_of(self.source, self.model)
        if self.difference.delta is not None:
            check_is_base(self.source, network)
        if self.recipe.seeds:
            return run_each("finetune", self)
        if network is not None:
            self._check_weights(network, weighs=row.facts.weighs)
        read = read_source(self.source, network, needs_head=self.keep_head)
        source = self.images.at_size(read)
        if self.difference.delta is not None and source.params is not read.params:
            raise InputError("--image-size changes the source's weights, and a delta stands on them as they are")
        if self.keep_head:
            check_knows_classes(source, self.source, "--keep-head keeps the source's classes")
        if row.facts.weighs:
            check_knows_classes(source, self.source, f"--method {self.method} weighs by the source's own loss")
        stay = self._stay(source.model, source.config["image_shape"])
        shape, resizing = self.images.for_run(source, self.data.data, resize=self.resize, usual=jt.data.Resizing())
        seed, rows = self.training.seed, self.training.batch_size
        train, val, test = load_sets(
            self.data, self.recipe.val_split, shape, resizing=resizing, seed=seed, batch_size=rows
        )
        for one in (train, test, *(() if val is None else (val,))):
            check_fits(source, one, self.source)
        training = self.training.for_data(len(train), self.training.batch_size)
        config = config_of(
            "finetune",
            self.data,
            training,
            self.recipe,
            self.frozen,
            **made_by("finetune", self),
            source=self.source,
            source_step=source.step,
            method=self.method,
            strength=strength_of(self),
            head_strength=self.head_strength,
            head_rate=self.head_rate,
            keep_head=self.keep_head,
            resize=shape is not None,
            knows=[CLASSES],
            class_names=list(train.class_names),
            **architecture(source.config),
            **({} if network is None else {f"source_{name}": source.config[name] for name in ("scheme", "weights")}),
            **noted(source.config, resizing),
        )
        config |= self.recipe.entries(config)
        model = build_model(config)
        kept, places = _kept(self, source, train) if self.keep_head else (source, None)
        if self.difference.delta is not None:
            if kept is not source:
                raise InputError(
                    f"--keep-head: {self.source} counts its classes otherwise than {train.name}, and a delta keeps its "
                    f"base as it is; leave one of the two out"
                )
            model, config[DELTA] = self.difference.made(source, model, train.image_shape, new_head=not self.keep_head)
            params = state = None
            say_counts(model, train.image_shape)
        else:
            params, state = _start(self, kept, model, train)
            params, state = {model.name: params}, {model.name: state}
        command, anchor = dataclasses.replace(self, training=training), {model.name: kept.params[source.model.name]}
        make = Ingredients(command, source, model, anchor, places, self.recipe.weights(train))
        phases = self.frozen.applied(self.difference.beside(row.build(make)), stay)
        stages, evaluated = self.recipe.applied(phases, model, config)
        train_stages(
            stages,
            config,
            training,
            train,
            test,
            val=val,
            eval_model=model,
            eval_objective=evaluated,
            monitor=self.recipe.monitor,
            unused=row.facts.unused,
            title=f"finetune {config['model']} on {self.data.data} by {self.difference.delta or self.method}",
            params=params,
            state=state,
        )

    def _check_delta(self) -> None:
        """Raises for what doesn't go with a delta."""
        self.difference.check()
        if self.difference.delta is None:
            return
        if self.method != type(self).method:
            raise InputError(f"--delta {self.difference.delta} trains a difference alone; leave --method out")
        if self.frozen.freeze or self.frozen.freeze_bn:
            raise InputError(
                f"--delta {self.difference.delta}: the source's weights stay anyway; --only says what the difference "
                f"changes, leave --freeze{'-bn' * (not self.frozen.freeze)} out"
            )
        if self.recipe.param_dtype is not None:
            raise InputError(
                f"--delta {self.difference.delta} keeps the source's weights as they are; leave --param-dtype out"
            )
        if self.keep_head and self.head_rate is not None:
            raise InputError("--head-rate: under --delta a head that is kept stays; leave it out")

    def _check_weights(self, network: str, *, weighs: bool) -> None:
        """Raises for what can't be done with weights of a file, before they are read or fetched."""
        if weighs:
            raise InputError(
                f"--method {self.method} weighs by the source's own loss on its own data, which the weights "
                f"{self.source} don't bring along; make a run of them: jaxtransfer convert --data"
            )
        body, shape = jt.models.create(network, 2), jt.models.ZOO[network].image
        self._stay(body, shape)

    def _stay(self, model: jt.Model, image_shape: Any) -> tuple[str, ...]:
        """Returns the patterns of what stays."""
        probes = METHODS[self.method].facts.probes
        return self.frozen.patterns(model, image_shape, new_head=not self.keep_head, head_alone=probes)


def _start(command: Finetune, source: Run, model: jt.Model, train: jt.data.Dataset) -> tuple[Any, Any]:
    """Returns the weights and statistics to start from: the source's, with a fresh head unless it is kept."""
    key = jax.random.key(command.training.seed)
    fresh = model.init(key, train.read([0])["image"])
    reinit = () if command.keep_head else model.head
    params = jt.transfer(source.params[source.model.name], fresh["params"], reinit=reinit).params
    return params, source.state[source.model.name]


def _kept(command: Finetune, source: Run, train: jt.data.Dataset) -> tuple[Run, np.ndarray]:
    """Returns the source with its head for the classes of the data, and where they stood in it."""
    try:
        found = places_in(source, train, command.source)
    except InputError as error:
        raise InputError(
            f"--keep-head needs the same classes: {command.source} has {len(source.config['class_names'])}, "
            f"{train.name} has {train.classes}; leave it out to start with a new head: {error}"
        ) from None
    return with_classes_of(source, train, command.source, found), found.places
