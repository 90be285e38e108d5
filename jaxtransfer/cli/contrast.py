"""`jaxtransfer contrast`: learn a representation from views of images, without labels."""

import contextlib
import dataclasses
import json
import sys
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from jaxtransfer import representation
from jaxtransfer.cli.dry_run import end_dry_run
from jaxtransfer.cli.features import PAIRS, bank_of, measured
from jaxtransfer.cli.options import (
    DataOptions,
    RunOptions,
    at_least,
    check_memory,
    config_of,
    divides_by_devices,
    load_pair,
    statistics,
)
from jaxtransfer.cli.registry.row import choices, having, names_with, row_of
from jaxtransfer.cli.registry.selfsupervised import METHODS, Settings, with_heads
from jaxtransfer.cli.runs import Run, build_model, load_run
from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.stages import check_model_takes, open_run
from jaxtransfer.cli.storage import StorageOptions
from jaxtransfer.cli.together import by_first
from jaxtransfer.cli.values import check_network
from jaxtransfer.data import views
from jaxtransfer.errors import InputError
from jaxtransfer.files import read_text
from jaxtransfer.runs.configuration import FEATURES
from jaxtransfer.runs.console import announcer, facts_of, print_results
from jaxtransfer.runs.files import write_atomically
from jaxtransfer.runs.report import write_report

_MOST = 0.3  # of the area, for small views; the large ones beside them show more


@dataclasses.dataclass(frozen=True)
class ViewOptions:
    """How a view is made of an image."""

    size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the images' own)")] = None
    """Side of the views in pixels; smaller ones cost less."""
    least: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 0.08; 0.3 beside --crops)")
    ] = None
    """Smallest share of an image's area that a view shows."""
    strength: float = 0.5
    """Of the changes of colour; 1 is usual for ImageNet, 0 leaves the colours as they are."""
    blur: bool = False
    """Blur half of the views; usual from ImageNet's size on."""
    no_flip: bool = False
    """Don't mirror the views; for digits, letters, traffic signs."""
    crops: Annotated[int, tyro.conf.arg(help_behavior_hint=having(METHODS, "crops", "0"))] = 0
    """Further views of half the side, which show at most 0.3 of the image."""

    def check(self) -> None:
        """Raises for values that no view can have."""
        at_least(self, 4, "size")
        at_least(self, 0, "strength", "crops")
        if self.least is not None and not 0 < self.least <= 1:
            raise InputError(f"--least is a share of the area, in (0, 1]; got {self.least}")
        if self.strength > 2:
            raise InputError(f"--strength of the colours is in [0, 2]; got {self.strength}")

    def names(self) -> tuple[str, ...]:
        """Returns the names of the small views."""
        return tuple(f"crop{number}" for number in range(1, self.crops + 1))

    def transform(self, side: int):
        """Returns what makes the views of a batch of images of a side."""
        size = self.size or side
        options = {"strength": self.strength, "blur": self.blur, "flip": not self.no_flip}
        large = views.simclr(size, area=(self.least or (_MOST if self.crops else 0.08), 1.0), **options)
        small = views.simclr(max(4, size // 2), area=(0.05, _MOST), **options)
        return views.many_views({"image": large, "image2": large, **dict.fromkeys(self.names(), small)})


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Train an encoder on views of images, without labels, for `finetune --from`.

    Labels only teach a linear probe beside the encoder (and supcon's encoder).

    The probe's accuracy on --eval-split chooses the checkpoint.

    The report adds neighbours, a probe to convergence and a picture.

    Of a single class there is no probe, and the last checkpoint is used.

    Example: jaxtransfer contrast --data cifar10 --size 24 --out runs/views
    """

    data: DataOptions
    training: RunOptions
    view: ViewOptions
    method: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(METHODS))] = "simclr"
    """What views of one image have to do:"""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "small-cnn"
    """Encoder; `jaxtransfer models` lists networks."""
    image_shape: Annotated[
        tuple[int, int, int] | None, tyro.conf.arg(metavar="H W C", help_behavior_hint="(default: the data's own)")
    ] = None
    """Bring images of any size to this height, width and number of channels (1 grey, 3 colour)."""
    batch_size: int = 256
    """Images per update, over all devices; a multiple of their number. They are each other's negatives."""
    micro_batch: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all at once)")] = None
    """Run the encoder on so many views at a time: the whole batch's gradient in the memory of a part.
    With batch norm it is another one: its statistics are then those of the parts."""
    temperature: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: usual for --method)")
    ] = None
    """Of the methods that have one; the first value where it is learned."""
    projection: Annotated[
        tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="(default: usual for --method)")
    ] = ()
    """Sizes of the layers of the projection on the encoder, the last one that of the embedding."""
    queue: Annotated[
        int | None,
        tyro.conf.arg(metavar="INT", help_behavior_hint=having(METHODS, "queue", "usual, or what the data allow")),
    ] = None
    """Vectors that are remembered; with a batch not more than there are images."""
    prototypes: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=having(METHODS, "prototypes", "usual for --method"))
    ] = None
    """Clusters that views agree on."""
    split_statistics: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=having(METHODS, "split_statistics", "1"))
    ] = None
    """Parts of the batch with batch-norm statistics of their own, about 32 images each: the statistics can't tell then
    which key belongs to a query."""
    knn_every: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: at the end)")] = None
    """Measure the nearest neighbours every so many steps; their accuracy then chooses the checkpoint."""
    storage: StorageOptions = dataclasses.field(default_factory=StorageOptions)

    def run(self) -> None:
        """Trains, or resumes, or says that it is done; then measures the representation."""
        self._check()
        train, test = load_pair(self.data, self.image_shape, seed=self.training.seed, batch_size=self.batch_size)
        if self.view.size is not None:
            shape = (self.view.size, self.view.size, train.image_shape[2])
            check_memory(self.batch_size, shape, "--size and --batch-size")
        train = train.with_columns({"index": np.arange(len(train), dtype=np.int32)})  # its own image is no negative
        training, out = self.training.for_data(len(train), self.batch_size), self.training.out
        config = self._config(train, training)
        transform = self.view.transform(min(train.image_shape[:2]))
        with open_run(out, config):
            encoder = build_model(config)
            check_model_takes(encoder, self.model, train)
            net = with_heads(encoder, self.method, tuple(config["projection"]))
            objective = self._objective(net, config)
            if objective.apart is not None and self.batch_size > len(train):
                raise InputError(
                    f"--batch-size: {self.batch_size} of {len(train)} images would hold some of them twice, each its "
                    f"own negative; take at most {len(train)}"
                )
            batches = jt.data.pipeline(train, self.batch_size, seed=training.seed)
            still, first = self.storage.mover(optax.identity(), config), _first(batches, transform)
            state = jt.init(objective, still, jax.random.key(0), first)  # raises
            self._check_whole_images(net, state, train)
            measure = self._neighbours(net, train, test)
        training.say_steps()
        fitted = jt.fit(
            objective,
            self.storage.mover(training.optimizer_for(training.updates), config),
            batches,
            transform=transform,
            steps=training.updates,
            key=training.seed,
            eval_data=jt.data.eval_batches(test, self.batch_size) if train.classes > 1 else None,
            eval_objective=jt.online_probe(net, train.classes) if train.classes > 1 else None,
            measure=measure,
            measure_every=self.knn_every,
            monitor=config["monitor"],
            save_every=training.eval_every or max(1, training.updates // 10),
            eval_every=training.eval_every,
            patience=training.patience,
            out=out,
            config=config,
            keep=training.keep,
            **training.where,
            log=announcer(),
            **training.looked_at,
        )
        end_dry_run(training, fitted)
        by_first(self._reported)(fitted, config, train, test, transform)

    def _reported(self, fitted: jt.Fitted, config: dict[str, Any], train: Any, test: Any, transform: Any) -> None:
        """Measures the encoder and writes the report."""
        rows = self._measured(load_run(out := self.training.out), train, test, transform)
        table = (f"The encoder at step {rows.pop('step')}", ("", "test images"), list(rows.items()))
        title, shown = f"{self.method} on {self.data.data}, {self.model}", {"The embedding": "embedding.png"}
        print_results(out, fitted, write_report(out, title, facts_of(config), tables=[table], pictures=shown))
        print("  ".join(f"{name} {value:.4g}" for name, value in rows.items()))

    def _check(self) -> None:
        for options in (self.training, self.storage, self.view):
            options.check()
        row = row_of("method", self.method, METHODS).facts
        check_network(self.model)
        at_least(self, 1, "batch_size", "micro_batch", "queue", "prototypes", "split_statistics", "knn_every")
        divides_by_devices("batch_size", self.batch_size)
        for name in ("temperature", "queue", "prototypes", "split_statistics"):
            if getattr(self, name) is not None and getattr(row, name) is None:
                raise InputError(f"--{name.replace('_', '-')}: {self.method} has none; leave it out")
        if self.projection and min(self.projection) < 1:
            raise InputError(f"--projection: sizes are at least 1; got {' '.join(map(str, self.projection))}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature must be positive and finite; got {self.temperature}")
        if self.view.crops and not row.crops:
            listed = ", ".join(names_with(METHODS, "crops"))
            raise InputError(f"--crops: {self.method} compares two views; small ones are for {listed}")
        self._check_parts()

    def _check_parts(self) -> None:
        parts, devices = self.split_statistics or 1, jax.device_count()
        if self.batch_size % parts:
            raise InputError(f"--split-statistics must divide --batch-size {self.batch_size}; got {parts}")
        if self.training.mode == "pmap" and parts > 1 and parts % devices:
            raise InputError(f"--split-statistics must be a multiple of the {devices} devices under pmap; got {parts}")

    def _config(self, train: jt.data.Dataset, training: RunOptions) -> dict[str, Any]:
        mean, std = statistics(train)
        row = METHODS[self.method].facts
        parts = {} if self.split_statistics is None else {"split_statistics": self.split_statistics}
        return config_of(
            "contrast",
            self.data,
            training,
            self.view,
            **made_by("contrast", self),
            knows=[FEATURES],
            heads=True,
            method=self.method,
            model=self.model,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            temperature=self.temperature or row.temperature,
            projection=list(self.projection or row.projection),
            queue=self._queue_for(train),
            prototypes=self.prototypes or row.prototypes,
            knn_every=self.knn_every,
            monitor=None if self.knn_every is None else "knn_accuracy",
            class_names=list(train.class_names),
            image_shape=list(train.image_shape),
            resize=self.image_shape is not None,
            mean=mean,
            std=std,
            **(parts | self.storage.model_options()),
        )

    def _queue_for(self, train: jt.data.Dataset) -> int | None:
        """Returns the length of the queue: what was asked for, or the usual, cut so that no image is in it twice."""
        usual, count, size = METHODS[self.method].facts.queue, len(train), self.batch_size
        if usual is None:
            return None
        most = count - size
        if self.queue is None and most >= size:
            if most < usual:
                print(
                    f"--queue: {most}, not {usual}, as with a batch of {size} it must not exceed the {count} images",
                    file=sys.stderr,
                )
            return min(usual, most)
        if most < size:
            raise InputError(
                f"--batch-size: {self.method} needs a queue of a batch or more, and a batch beside it, of different "
                f"images; there are {count}, so take at most {count // 2}"
            )
        assert self.queue is not None
        if self.queue > most:
            raise InputError(
                f"--queue: {self.queue} vectors and a batch of {size} are more than the {count} images, so an image "
                f"would meet itself; take at most {most}"
            )
        return self.queue

    def _objective(self, net: jt.Model, config: dict[str, Any]) -> jt.Objective:
        """Returns what trains: the method, and the probe beside it."""
        net = net if self.micro_batch is None else jt.micro_batched(net, self.micro_batch)
        told = {name: config[name] or 0 for name in ("temperature", "queue", "prototypes")}
        settings = Settings(
            **told,
            crops=self.view.names(),
            steps=config["steps"],
            split_statistics=self.split_statistics or 1,
        )
        objective = METHODS[self.method].build(net, settings)
        classes = len(config["class_names"])
        return objective + jt.online_probe(net, classes, beside=objective) if classes > 1 else objective

    def _check_whole_images(self, net: jt.Model, state: jt.TrainState, train: jt.data.Dataset) -> None:
        """Raises for a network that takes images of one size, where the views have another than the images."""
        variables = {"params": state.params[net.name], **state.state.get(net.name, {})}
        image = jax.ShapeDtypeStruct((1, *train.image_shape), np.uint8)
        try:
            jax.eval_shape(lambda v, x: net.apply(v, x, train=False, key=None)[0], variables, image)
        except Exception as error:  # whatever a network of another library raises
            raise InputError(
                f"{self.model} takes images of one size, and is evaluated on whole ones, {train.image_shape}: leave "
                f"--size out, or bring the images to a square by --image-shape"
            ) from error

    def _neighbours(self, net: jt.Model, train: jt.data.Dataset, test: jt.data.Dataset):
        """Returns what measures the encoder in training, where it is asked for."""
        if self.knn_every is None:
            return None
        if train.classes < 2:
            raise InputError(f"--knn-every: neighbours tell classes apart, and {train.name} has one; leave it out")
        return representation.neighbours(
            net, *(jt.data.eval_batches(split, self.batch_size) for split in (bank_of(train), test))
        )

    def _measured(self, run: Run, train: jt.data.Dataset, test: jt.data.Dataset, transform) -> dict[str, Any]:
        """Returns how good the best checkpoint's features are, and draws them; measured once per run directory."""
        path = self.training.out / "representation.json"
        with contextlib.suppress(OSError, ValueError):  # not there, or not what was written: measured anew
            known = json.loads(read_text(path))
            if isinstance(known, dict) and known.get("step") == run.step and _are_numbers(known):
                return known
        embedded, scores = measured(run, train, test, self.batch_size)
        some = jt.data.eval_batches(test.take(min(PAIRS, len(test))), self.batch_size)
        pair = representation.embed_views(run.model, run.variables, some, transform, key=jax.random.key(0))
        facts = {"step": run.step, **scores, "alignment": representation.alignment(*(one.features for one in pair))}
        shown = representation.Embedded(embedded.features[:PAIRS], embedded.labels[:PAIRS])
        representation.plot_embedding(shown, self.training.out / "embedding.png", names=train.class_names)
        write_atomically(path, json.dumps(facts) + "\n")
        return facts


def _are_numbers(facts: dict[str, Any]) -> bool:
    return {"uniformity", "alignment"} <= facts.keys() and all(isinstance(v, int | float) for v in facts.values())


def _first(batches: jt.data.Pipeline, transform) -> dict[str, Any]:
    """Returns a batch of the shapes that training will see, its images zero: nothing is compiled for it."""
    batch = batches.batch(0)
    rows = jax.ShapeDtypeStruct((len(batch["label"]),), np.int32)
    shapes = jax.eval_shape(transform, jax.random.key(0), batch, rows)
    return {**jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(shapes)), "label": batch["label"]}
