"""The same run with several seeds, and what they come to together."""

import dataclasses
import json
from typing import Any

from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.together import by_first
from jaxtransfer.errors import InputError
from jaxtransfer.runs.directory import CONFIG
from jaxtransfer.runs.files import write_atomically
from jaxtransfer.runs.report import table
from jaxtransfer.runs.result import SUMMARY, read_result, spreads


def check_seeds(training: Any, seeds: tuple[int, ...]) -> None:
    """Raises for seeds that no runs can have."""
    if not seeds:
        return
    if training.seed:
        raise InputError("--seed and --seeds both say the seed; give one of them")
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise InputError(
            f"--seeds are whole numbers from 0 on, below 2**32, each once; got {' '.join(map(str, seeds))}"
        )
    if (training.out / CONFIG).exists():
        raise InputError(f"{training.out} holds a run, and --seeds makes one in a folder of each; choose another --out")


def run_each(name: str, command: Any) -> None:
    """Runs a command once for each of its --seeds, in OUT/seed-N, and writes their means with intervals to OUT.

    Args:
      name: of the command.
      command: with `training` and `recipe`.
    """
    seeds, out, outs = command.recipe.seeds, command.training.out, []
    for seed in seeds:
        training = dataclasses.replace(command.training, seed=seed, out=out / f"seed-{seed}")
        one = dataclasses.replace(command, training=training, recipe=dataclasses.replace(command.recipe, seeds=()))
        one.run()
        outs.append(training.out)
    by_first(_summed_up)(name, command, outs)


def _summed_up(name: str, command: Any, outs: list[Any]) -> None:
    """Writes what the runs came to together."""
    seeds, out = command.recipe.seeds, command.training.out
    results = [read_result(one) or {} for one in outs]
    scores = spreads(results)
    where = {key: results[0].get(key) for key in ("chosen on", "test on")}
    listed = {
        metric: {"mean": one.mean, "interval": None if len(seeds) == 1 else one.half, "values": list(one.values)}
        for metric, one in scores.items()
    }
    summary = {"seeds": list(seeds), **where, "test": listed, **made_by(name, command)}
    write_atomically(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    header = ("metric", "mean ± 95 % interval (Student t)", *(f"seed {seed}" for seed in seeds))
    rows = [(metric, str(one), *one.values) for metric, one in scores.items()]
    lines = [
        f"# {name} with {len(seeds)} seeds",
        "",
        f"{_chosen(where['chosen on'])}; these are its scores on {where['test on']}.",
    ]
    lines += ["", *table(header, rows), ""]
    lines += [
        f"- seed {seed}: [step {one.get('step')}](seed-{seed}/report.md)"
        for seed, one in zip(seeds, results, strict=True)
    ]
    write_atomically(out / "report.md", "\n".join(lines) + "\n")
    told = ", ".join(f"{metric} {one}" for metric, one in scores.items())
    print(f"{len(seeds)} seeds, mean ± 95 % interval: {told}\nreport: {out / 'report.md'}")


def _chosen(where: str | None) -> str:
    return "The last step is the result" if where is None else f"The best step was chosen on {where}"
