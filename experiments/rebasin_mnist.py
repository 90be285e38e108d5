"""Two perceptrons trained apart on MNIST lie in one basin once their units stand in one order: Git Re-Basin.

Two networks of the same layers begin at other weights and see other batches. On the line between them the loss rises:
the barrier, max over α of L((1 − α) w₁ + α w₂) − (1 − α) L(w₁) − α L(w₂). Then the units of the second are put in the
order that is nearest to the first, which changes nothing of what it computes, and the line is walked again (Ainsworth
et al. 2023, arXiv:2209.04836).

    TFDS_DATA_DIR=... python -m experiments.rebasin_mnist

A pair takes 93 s of processor time, most of it training (7 minutes on two cores that twenty others shared), the
matching 2 s. Two pairs (`--pairs 2`, layers of 512 and 512 units, 1,000 updates of 256 examples):

             barrier apart    aligned          gone             accuracy half-way, apart and aligned
    train    0.729, 0.762     0.034, 0.036     95.3, 95.3 %     88.5, 88.8 %     98.1, 98.0 %
    test     0.697, 0.724     0.022, 0.026     96.8, 96.4 %     87.9, 88.6 %     97.5, 97.2 %

Offline, in seconds: `--tiny --data digits/upright`.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import jaxtransfer as jt


@dataclasses.dataclass(frozen=True)
class Rebasin:
    """Train pairs of perceptrons, align them and walk the line between them; writes a table, numbers and a plot."""

    out: Path = Path("runs/rebasin_mnist")
    """Folder for rebasin.json and barrier.png."""
    data: str = "mnist"
    """Any data set of images with a class each."""
    data_dir: Path | None = None
    """Folder of the prepared tfds data sets; by default $TFDS_DATA_DIR."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers: the wider, the lower the barrier that stays."""
    steps: int = 1_000
    """Updates of each network."""
    batch_size: int = 256
    """Examples in each, drawn with replacement."""
    learning_rate: float = 1e-3
    """Adam's, falling to 0 as a cosine."""
    pairs: int = 1
    """Pairs of networks: seeds 0 and 1, 2 and 3, ..."""
    points: int = 11
    """Places on the line, ends included."""
    tiny: bool = False
    """Small networks, 100 updates, one pair: shows that everything runs."""


def main(options: Rebasin) -> dict[str, Any]:
    """Trains, aligns, walks the lines and returns the results, writing them as well."""
    if options.tiny:
        options = dataclasses.replace(options, hidden=(32, 32), steps=100, batch_size=64, pairs=1)
    if options.pairs < 1 or options.points < 3:
        raise jt.InputError(f"expected a pair or more and 3 points or more; got {options.pairs} and {options.points}")
    begin = time.perf_counter()
    splits = {split: jt.data.load(options.data, split, data_dir=options.data_dir) for split in ("train", "test")}
    held = {split: _on_device(data) for split, data in splits.items()}
    model = jt.models.mlp(splits["train"].classes, hidden=options.hidden)
    trained = [train(model, options, held["train"], seed) for seed in range(2 * options.pairs)]
    trained_in = time.perf_counter() - begin
    aligned, matched_in = [], 0.0
    for first, second in zip(trained[::2], trained[1::2], strict=True):
        start = time.perf_counter()
        aligned.append(jt.fusion.rebasin(first, second, jt.fusion.specification(first)))
        matched_in += time.perf_counter() - start
    walk = functools.partial(_along, model, np.linspace(0, 1, options.points))
    lines = {
        split: [
            {"apart": walk(first, second, data), "aligned": walk(first, other, data)}
            for first, second, other in zip(trained[::2], trained[1::2], aligned, strict=True)
        ]
        for split, data in held.items()
    }
    results: dict[str, Any] = {
        "barrier": {split: [_barriers(line) for line in own] for split, own in lines.items()},
        "lines": lines,
        "train_seconds": round(trained_in, 1),
        "matching_seconds": round(matched_in, 1),
        "options": {**dataclasses.asdict(options), "out": str(options.out), "data_dir": None},
        "device": jax.devices()[0].device_kind,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    _plot(lines, options.out / "barrier.png")
    results["seconds"] = round(time.perf_counter() - begin, 1)
    (options.out / "rebasin.json").write_text(json.dumps(results, indent=1) + "\n")
    _show(results, Console())
    return results


def train(model: jt.Model, options: Rebasin, data: dict[str, jax.Array], seed: int) -> dict[str, Any]:
    """Returns the variables of a network trained on batches that are drawn inside of the compiled step."""
    objective = jt.classification(model)
    optimizer = optax.adam(jt.schedules.cosine(options.learning_rate, options.steps))

    def sample(key, data):
        rows = jax.random.randint(key, (options.batch_size,), 0, len(data["label"]))
        return {"image": _scaled(data["image"][rows]), "label": data["label"][rows]}

    key = jax.random.key(seed)
    state = jt.init(objective, optimizer, key, jax.jit(sample)(key, data))
    many = next(n for n in (100, 50, 20, 10, 5, 2, 1) if options.steps % n == 0)
    step = jt.train_step(objective, optimizer, sample=sample, steps_per_call=many)
    for _ in range(options.steps // many):
        state, _ = step(state, data)
    return {"params": jax.device_get(state.params[model.name])}


def _along(model: jt.Model, places: np.ndarray, first: Any, second: Any, data: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns loss and accuracy at some places of the line from one network to another."""
    found = [_measured(model, jt.fusion.wise_ft(first, second, alpha=float(place)), data) for place in places]
    return {"loss": [loss for loss, _ in found], "accuracy": [accuracy for _, accuracy in found]}


def _measured(model: jt.Model, variables: Any, data: dict[str, jax.Array]) -> tuple[float, float]:
    totals = [_summed(model, variables, chunk) for chunk in _chunks(data)]
    return tuple(float(sum(column)) / len(data["label"]) for column in zip(*totals, strict=True))  # pyright: ignore


@functools.partial(jax.jit, static_argnums=0)
def _summed(model: jt.Model, variables: Any, chunk: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    outputs, _ = model.apply(variables, _scaled(chunk["image"]), train=False, key=None)
    losses = jt.losses.cross_entropy(outputs["logits"], chunk["label"])
    return jnp.sum(losses), 100 * jnp.sum(jt.losses.top_k(outputs["logits"], chunk["label"]))


def _chunks(data: dict[str, jax.Array], size: int = 10_000) -> list[dict[str, jax.Array]]:
    return [{name: rows[at : at + size] for name, rows in data.items()} for at in range(0, len(data["label"]), size)]


def _on_device(data: jt.data.Dataset) -> dict[str, jax.Array]:
    batch = data.read(np.arange(len(data)))
    return {"image": jnp.asarray(batch["image"]), "label": jnp.asarray(batch["label"])}


def _scaled(image: jax.Array) -> jax.Array:
    return image.astype(jnp.float32) / 255 if jnp.issubdtype(image.dtype, jnp.integer) else image


def _barriers(line: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Returns the barrier of either line, the part of it that is gone, and the accuracy half-way."""
    found = {}
    for name, walked in line.items():
        loss = np.asarray(walked["loss"])
        straight = np.linspace(loss[0], loss[-1], len(loss))
        found[name] = round(float(np.max(loss - straight)), 4)
        found[f"{name}_middle_accuracy"] = round(float(walked["accuracy"][len(loss) // 2]), 2)
    return {**found, "gone": round(100 * (1 - found["aligned"] / found["apart"]), 1) if found["apart"] > 0 else 0.0}


def _show(results: dict[str, Any], console: Console) -> None:
    table = Table("split", "pair", "barrier apart", "aligned", "gone, %", "accuracy half-way, %: apart", "aligned")
    for split, pairs in results["barrier"].items():
        for number, pair in enumerate(pairs):
            middle = (f"{pair[f'{name}_middle_accuracy']:.2f}" for name in ("apart", "aligned"))
            barriers = (f"{pair['apart']:.3f}", f"{pair['aligned']:.3f}", f"{pair['gone']:.1f}")
            table.add_row(split, str(number), *barriers, *middle)
    console.print(table)
    console.print(
        f"{results['seconds']} s: {results['train_seconds']} s of training, {results['matching_seconds']} s of matching"
    )


def _plot(lines: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(lines), figsize=(8, 3), layout="constrained", squeeze=False)
    for axis, (split, own) in zip(axes[0], lines.items(), strict=True):
        for name, color in (("apart", "tab:red"), ("aligned", "tab:blue")):
            for number, line in enumerate(own):
                loss = line[name]["loss"]
                axis.plot(np.linspace(0, 1, len(loss)), loss, color=color, label=name if not number else None)
        axis.set(title=split, xlabel="α", ylabel="loss")
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Rebasin))
    except jt.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
