"""`jaxtransfer merge`: several runs of one architecture fused into one."""

import dataclasses
import functools
import math
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.domain_names import part_of
from jaxtransfer.cli.merge_data import Task, load_tasks, mixed, some_of, streams_of, trained_on, view_of
from jaxtransfer.cli.merge_report import Scores, merged_config, reported, write_merged
from jaxtransfer.cli.merge_runs import Member, read_deltas, read_members
from jaxtransfer.cli.options import DataDir, at_least, check_folder
from jaxtransfer.cli.registry.merging import CONSENSUS, METHODS, Made, Making
from jaxtransfer.cli.registry.row import choices, listed, row_of
from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.task_scores import entries_of
from jaxtransfer.cli.validation import share_of
from jaxtransfer.cli.words import given_options
from jaxtransfer.errors import InputError
from jaxtransfer.parts.learns import CLASSES
from jaxtransfer.runs.directory import MADE, open_run
from jaxtransfer.runs.result import read_result

_OWN = ("scale", "t", "density", "gamma", "epsilon", "consensus", "off-diagonal", "steps", "lr")


def _of(option: str) -> str:
    """Returns what follows an option's help: the methods that have it."""
    return f"({', '.join(name for name, row in METHODS.items() if option in row.facts.options)})"


@dataclasses.dataclass(frozen=True)
class Merge:
    """Fuse the weights of several runs of one architecture into a run of its own.

    A delta goes into its base: jaxtransfer merge BASE DELTA --method delta.

    Classes are matched by name. The labels of test examples choose nothing.

    Batch norm gets statistics that belong to the merged weights, from --data.

    Example: jaxtransfer merge runs/a runs/b --data A B --out runs/merged
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")]
    """Run directories (their best checkpoints), or files of weights."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Run directory to write: what evaluate, predict, finetune --from and export take."""
    method: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(METHODS))] = "average"
    """How to fuse."""
    base: Annotated[str | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="(default: none)")] = None
    """What the runs were fine-tuned from, for methods of changes."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the files say)")] = None
    """Network that weights in files are of, where their names don't tell."""
    safetensors: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Write the merged weights to this file, too; `jaxtransfer export` writes other libraries' names."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: none)")] = ()
    """Data sets of the runs, as for adapt (after @ the split to train on); table:PATH for runs on a table. Each
    run, their plain average and the merged one are tested on each, and statistics are renewed on all."""
    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split for statistics, and for methods that look at examples."""
    eval_split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "test"
    """Split to test on."""
    val_split: Annotated[str | None, tyro.conf.arg(metavar="SPLIT", help_behavior_hint="(greedy-soup)")] = None
    """Examples to choose by: a split, or a share of --split such as 0.1; better such as no run was trained on."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""
    keep_statistics: bool = False
    """Leave batch statistics mixed where there is no --data to renew them on; accuracy then says little."""
    weights: Annotated[
        tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...", help_behavior_hint="(default: the same)")
    ] = ()
    """One number a run."""
    scale: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_of("scale"))] = None
    """Of the changes; of ada-merging the coefficient to start from (1; 0.3)."""
    t: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_of("t"))] = None
    """Where between the two, from 0 to 1 (0.5)."""
    density: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_of("density"))] = None
    """Share of the changes that stays."""
    gamma: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_of("gamma"))] = None
    """Share of the largest changes that goes (0.01)."""
    epsilon: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_of("epsilon"))] = None
    """How far chances to stay lie around --density (0.15)."""
    consensus: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=f"\n{listed(CONSENSUS)}\n(default: the method's)")
    ] = None
    """How the changes of several runs become one."""
    off_diagonal: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_of("off-diagonal"))] = None
    """What inputs' products beside the diagonal are multiplied by, from 0 to 1 (0.9)."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_of("steps"))] = None
    """Updates of the coefficients (200)."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_of("lr"))] = None
    """Their rate (0.01)."""
    batch_size: int = 256
    """Examples at a time."""
    seed: int = 0
    """Of what is drawn: entries left out, examples, a share to choose by."""

    def run(self) -> None:
        """Merges, tests, writes and reports."""
        self._check()
        facts = METHODS[self.method].facts
        members, base = read_deltas(self.runs) if facts.deltas else read_members(self.runs, self.base, self.model)
        first = members[0]
        view, scored = view_of(first.run), CLASSES in first.run.knows
        if (facts.labels or facts.validation or facts.classes) and not scored:
            what = "probabilities" if facts.classes else "labels"
            raise InputError(
                f"--method {self.method} reads {what} of classes; {first.name} knows {' and '.join(first.run.knows)}"
            )
        if self.data and view == "tokens":
            raise InputError(f"--data: {first.name} takes tokens of texts, which commands don't load; merge in Python")
        statistics = bool(jax.tree.leaves({k: v for k, v in first.variables.items() if k != "params"}))
        if statistics and not self.data and not self.keep_statistics and not (facts.deltas and len(members) == 1):
            raise InputError(
                f"{first.name} has batch norm, whose statistics are of no use to merged weights: --data NAME renews "
                f"them, labels are not needed (--keep-statistics leaves their mean)"
            )
        tasks = load_tasks(
            self.data,
            first,
            split=self.split,
            eval_split=self.eval_split,
            val_split=self.val_split if facts.validation else None,
            data_dir=self.data_dir,
            seed=self.seed,
        )
        config = merged_config(first, self._config(members))
        with open_run(self.out, config):
            done = read_result(self.out) is not None  # the last that is written: a merge may have been cut off
            told = [f"already done: {self.out}", f"report: {self.out / 'report.md'}"]
            told = told if done else self._merge(members, base, tasks, config, statistics=statistics)
        if self.safetensors is not None and not (done and self.safetensors.exists()):
            print(jt.export_weights(self.out, self.safetensors))
        print("\n".join(told))

    def _merge(
        self, members: list[Member], base: Member | None, tasks: list[Task], config: dict[str, Any], *, statistics: bool
    ) -> list[str]:
        """Merges what was read, tests it, and writes it with its report; returns what to print."""
        facts, first = METHODS[self.method].facts, members[0]
        model, view = first.run.model, view_of(first.run)
        scores = Scores(model, view, tasks, self.batch_size)
        renew, seen = self._renewing(model, view, tasks, statistics)
        make = Making(
            model=model,
            runs=[one.variables for one in members],
            names=tuple(one.name for one in members),
            base=None if base is None else base.variables,
            weights=self.weights or None,
            options={**self._options, "batch-size": self.batch_size} if facts.data else self._options,
            view=view,
            own=lambda number: some_of(_own(members[number], tasks), self.batch_size, self.seed),
            streams=lambda rows: streams_of(tasks, rows, self.seed),
            score=scores.validation,
            renew=renew,
            seed=self.seed,
        )
        made = METHODS[self.method].build(make)
        variables = made.variables if made.untouched else renew(made.variables)
        notes = self._notes(made, members, tasks, statistics, seen)
        for note in notes:
            print(note, file=sys.stderr)
        columns = {one.name: scores(one.variables) for one in (*((base,) if base is not None else ()), *members)}
        if len(members) > 1 and not (facts.plain and not self.weights):
            columns["uniform average"] = scores(renew(jt.fusion.average(make.runs)))
        columns[f"merged: {self.method}"] = scores(variables)
        write_merged(self.out, variables, first, columns)
        page, told = reported(self.out, self.method, config, columns, tasks, notes)
        return [told, f"report: {page}"]

    @property
    def _options(self) -> dict[str, Any]:
        """The method's options that were given, by their names."""
        values = {name: getattr(self, name.replace("-", "_")) for name in _OWN}
        return {name: value for name, value in values.items() if value is not None}

    def _check(self) -> None:
        """Raises for what can't be, before anything is read."""
        facts = row_of("method", self.method, METHODS).facts
        at_least(self, 1, "batch_size", "steps")
        at_least(self, 0, "seed")
        check_folder(self.data_dir)
        share_of(self.val_split)
        if self.safetensors is not None and self.safetensors.is_dir():
            raise InputError(f"--safetensors: expected a file to write, and {self.safetensors} is a folder")
        if not facts.least <= len(self.runs) <= (facts.most or len(self.runs)):
            some = f"{facts.least}" if facts.most == facts.least else f"{facts.least} or more"
            raise InputError(f"--method {self.method} takes {some} runs; got {len(self.runs)}")
        if facts.base and self.base is None:
            raise InputError(f"--method {self.method} is of what fine-tuning changed; say from what: --base RUN")
        if not facts.base and self.base is not None:
            raise InputError(f"--base: {self.method} has no use for it; leave it out")
        if self.weights and not facts.weights:
            raise InputError(f"--weights: {self.method} has none; leave them out")
        if self.weights and (len(self.weights) != len(self.runs) or not all(map(math.isfinite, self.weights))):
            raise InputError(f"--weights are {len(self.runs)} finite numbers, one a run; got {len(self.weights)}")
        for option in self._options:
            if option not in facts.options:
                raise InputError(f"--{option}: {self.method} has none; leave it out")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"--lr must be positive and finite; got {self.lr}")
        if self.consensus is not None:
            row_of("consensus", self.consensus, CONSENSUS)
        if facts.data and not self.data:
            raise InputError(f"--method {self.method} looks at examples; say at which: --data NAME")
        if facts.validation and self.val_split is None:
            raise InputError(
                f"--method {self.method} chooses by validation examples; say which: --val-split 0.1, or a split, "
                f"better one that no run was trained on"
            )
        if self.val_split is not None and not facts.validation:
            raise InputError(f"--val-split: {self.method} chooses nothing; leave it out")
        if self.keep_statistics and self.data:
            raise InputError("--keep-statistics: --data renews them; leave one of the two out")
        if len(set(self.data)) < len(self.data):
            raise InputError(f"--data: expected each data set once; got {' '.join(self.data)}")

    def _renewing(self, model: jt.Model, view: str, tasks: list[Task], statistics: bool) -> tuple[Any, int]:
        """Returns what gives variables statistics of their own, and of how many examples these are; 0 for none."""
        if not statistics or not tasks:
            return lambda variables: variables, 0
        batches, seen = mixed(tasks, view, self.batch_size, self.seed)
        return functools.partial(_renewed, model, batches, view, self.seed), seen

    def _notes(self, made: Made, members: list[Member], tasks: list[Task], statistics: bool, seen: int) -> list[str]:
        """Returns what is to be said of the merged run, a sentence each."""
        notes = [made.told] if made.told else []
        if seen and made.untouched:
            notes.append("It is a run as it was, with its own batch statistics.")
        elif seen:
            where = ", ".join(task.train.title for task in tasks)
            notes.append(f"Batch statistics were renewed on {seen} examples of {where}, without their labels.")
        elif statistics and not made.untouched:
            notes.append("Batch statistics are the mean of the runs' own, which belong to other weights: renew them.")
        if METHODS[self.method].facts.validation:
            chosen = ", ".join(f"{task.val.title}, {len(task.val)} examples" for task in tasks if task.val is not None)
            notes += [f"Chosen by {chosen}.", *trained_on(tasks, members, str(self.val_split), self.seed)]
        first = members[0]
        for task in tasks if first.run.tasks else ():
            if not task.learned:
                own = ", ".join(dict.fromkeys(one["data"] for one in entries_of(first.run)))
                notes.append(f"{first.name} learned its tasks from {own}: nothing is tested on {task.name}.")
        if any(task.test is not None for task in tasks):
            notes.append("Test examples are looked at once, after merging: their labels chose nothing.")
        return notes

    def _config(self, members: list[Member]) -> dict[str, Any]:
        """Returns what is noted of the merged run, besides its network and inputs."""
        given = given_options(self)
        skip = ("out", "data", "data-dir", "safetensors", "runs")
        own = {name.replace("-", "_"): value for name, value in given.items() if name not in skip}
        first = members[0].run.config
        part = part_of(self.data[0], self.split, self.eval_split) if self.data else None
        places = {
            "data": first.get("data") if part is None else part.name,
            "split": first.get("split", self.split) if part is None else part.train,
            "eval_split": first.get("eval_split", self.eval_split) if part is None else part.test,
        }
        made = made_by("merge", self)
        line = made[MADE]["command line"]
        made[MADE]["command line"] = line.replace(" --runs ", " ", 1)  # they stand by their place
        return {
            **{"method": self.method, "merged": list(self.runs), **own, "base": self.base},
            **{name: value for name, value in places.items() if value},
            **{"merged_data": list(self.data), "seed": self.seed, "shots": None},
            **made,
        }


def _own(member: Member, tasks: list[Task]) -> list[Task]:
    """Returns the data sets that a run says it was trained on; all of them where it says none of these."""
    name, split = member.run.config.get("data"), member.run.config.get("split")
    same = [task for task in tasks if part_of(task.name, "", None).name == name]
    exactly = [task for task in same if task.train.split == split]
    return exactly or same or tasks


def _renewed(model: jt.Model, batches: list[Any], view: str, seed: int, variables: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return jt.fusion.renewed(model, variables, batches, view=view, key=seed)
