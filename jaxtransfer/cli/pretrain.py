"""`jaxtransfer pretrain`: train a model from scratch."""

import dataclasses
from typing import Annotated

import tyro

import jaxtransfer as jt
from jaxtransfer import models
from jaxtransfer.cli.image_options import CropOptions, noted
from jaxtransfer.cli.options import DataOptions, TrainOptions, config_of, statistics
from jaxtransfer.cli.recipe import RecipeOptions
from jaxtransfer.cli.runs import build_model
from jaxtransfer.cli.seeds import check_seeds, run_each
from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.stages import train_stages
from jaxtransfer.cli.validation import load_sets
from jaxtransfer.cli.values import check_network
from jaxtransfer.runs.configuration import CLASSES


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Train a model of the zoo from scratch, for `finetune` to start from.

    Example: jaxtransfer pretrain --data digits/upright --steps 500 --out runs/a
    """

    data: DataOptions
    training: TrainOptions
    recipe: RecipeOptions
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "small-cnn"
    """Network; `jaxtransfer models` lists them."""
    image_shape: Annotated[
        tuple[int, int, int] | None, tyro.conf.arg(metavar="H W C", help_behavior_hint="(default: the data's own)")
    ] = None
    """Bring images of any size to this height, width and number of channels (1 grey, 3 colour).
    A folder of images of several sizes is brought to what the network was made for."""
    images: CropOptions = dataclasses.field(default_factory=CropOptions)

    def run(self) -> None:
        """Trains, or resumes, or says that it is done."""
        self.training.check()
        self.recipe.check()
        check_seeds(self.training, self.recipe.seeds)
        check_network(self.model)
        self.images.check()
        if self.recipe.seeds:
            return run_each("pretrain", self)
        shape, resizing = self.images.for_new(
            self.data.data, self.data.split, self.data.data_dir, self.image_shape, models.ZOO[self.model].image
        )
        seed, rows = self.training.seed, self.training.batch_size
        train, val, test = load_sets(
            self.data, self.recipe.val_split, shape, resizing=resizing, seed=seed, batch_size=rows
        )
        training = self.training.for_data(len(train), self.training.batch_size)
        mean, std = statistics(train)
        config = config_of(
            "pretrain",
            self.data,
            training,
            self.recipe,
            **made_by("pretrain", self),
            knows=[CLASSES],
            model=self.model,
            class_names=list(train.class_names),
            image_shape=list(train.image_shape),
            resize=shape is not None,
            mean=mean,
            std=std,
        )
        config |= self.recipe.entries(config)
        config |= noted(config, resizing)
        model = build_model(config)
        optimizer = training.optimizer_for(training.updates)
        loss = {"label_smoothing": training.label_smoothing, "weight": self.recipe.weights(train)}
        stages, evaluated = self.recipe.applied(jt.methods.full(model, optimizer, **loss), model, config)
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
            title=f"pretrain {self.model}",
        )
