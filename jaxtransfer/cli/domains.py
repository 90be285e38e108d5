"""The domains that `adapt` learns from: their splits, their images in one shape, their classes by name."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.domain_names import FOLDER, Part, part_of
from jaxtransfer.cli.options import DataDir, at_least, check_folder
from jaxtransfer.data.classes import match_classes
from jaxtransfer.data.unlabelled import load_unlabelled
from jaxtransfer.errors import InputError
from jaxtransfer.resizing import STRETCH, Resizing
from jaxtransfer.runs.console import shown

SOURCE, TARGET, LABELLED = "source", "target", "labelled"
_HELD_OUT = 0.1  # of a source without a split to evaluate on
_UNKNOWN = "unknown"  # the class of what is of no class of the source
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DomainOptions:
    """What is known, and what it is to be moved to."""

    target: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Domain to adapt to, whose labels are not learned from: a data set as for --source, or a folder:PATH of images in
    no class folders."""
    source: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(or --sources)")] = None
    """Labelled domain to learn from: digits/upright (offline), folder:PATH (class folders) or a name of tfds; a split
    after @ where the domains are splits of one data set, as in emoji_domains@noto. Classes are matched by name."""
    sources: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: --source)")
    ] = ()
    """Several of them."""
    target_shots: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: none)")] = None
    """Labelled target examples per class that are learned from, too, chosen by --seed; fewer of a class that has
    fewer."""
    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split of the source to train on; slices such as train[:90%] work."""
    eval_split: Annotated[
        str | None, tyro.conf.arg(metavar="SPLIT", help_behavior_hint="(default: test, else a tenth held out)")
    ] = None
    """Split of the source to evaluate on."""
    target_split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split of the target to adapt to."""
    target_eval_split: Annotated[
        str | None, tyro.conf.arg(metavar="SPLIT", help_behavior_hint="(default: test, else --target-split)")
    ] = None
    """Split of the target to test on, where it has labels."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, as they are named on the command line."""
        return self.sources or (() if self.source is None else (self.source,))

    @property
    def keys(self) -> tuple[str, ...]:
        """What batches and metrics call the sources."""
        names = self.names
        return (SOURCE,) if len(names) == 1 else tuple(f"{SOURCE}{number}" for number, _ in enumerate(names, 1))

    def source_part(self, name: str) -> Part:
        """Returns what the name of a source stands for."""
        return part_of(name, self.split, self.eval_split)

    def check(self) -> None:
        """Raises for what no domains can be, before anything is loaded."""
        at_least(self, 1, "target_shots")
        check_folder(self.data_dir)
        if self.source is not None and self.sources:
            raise InputError("--source and --sources both say what to learn from; give one of them")
        part = part_of(self.target, self.target_split, self.target_eval_split)
        if any(one.place == part.place and one.train in part[1:3] for one in map(self.source_part, self.names)):
            raise InputError(
                f"--target {self.target} is a source, too, so that its labels would be learned from; name another "
                f"domain, or another split of it"
            )
        if not self.names and (self.eval_split is not None or self.split != "train"):
            raise InputError("--split and --eval-split are of the source, and there is none; leave them out")
        if part.flat and (part.asked or part.train != "train"):
            raise InputError(
                f"--target-split and --target-eval-split: {self.target} has no splits, its images lie in no class "
                f"folders; leave them out"
            )
        if len(set(self.names)) < len(self.names):
            raise InputError(f"--sources: expected each domain once; got {' '.join(self.names)}")


class Domains(NamedTuple):
    """The domains of a run, their images of one shape and their labels those of `class_names`.

    Attributes:
      sources: by what batches call them, the examples to train on.
      held: likewise, those that are held out.
      target: the target's training examples, without their labels.
      test: labelled target examples to test on; None where the target has no labels.
      labelled: target examples that are learned from with their labels; None for none.
      class_names: of the run.
      resizing: how the images are brought to their shape; None where they have it.
      notes: what is to be said of them, a sentence each.
    """

    sources: dict[str, jt.data.Dataset]
    held: dict[str, jt.data.Dataset]
    target: jt.data.Dataset
    test: jt.data.Dataset | None
    labelled: jt.data.Dataset | None
    class_names: tuple[str, ...]
    resizing: Any
    notes: tuple[str, ...]


def load_domains(
    options: DomainOptions,
    shape: Any,
    resizing: Any,
    *,
    known: Sequence[str] = (),
    keeps: bool = False,
    labels: bool = False,
    unknown: bool = False,
    seed: int = 0,
) -> Domains:
    """Loads all domains.

    Args:
      options: of the command line, checked.
      shape: to which images are brought; None where they have it.
      resizing: how.
      known: the class names of the run that is started from; their order is kept where the sources have the same.
      keeps: whether they are those of the run in any case.
      labels: whether all labels of the target are learned from, those of its training examples.
      unknown: whether there is a class more, for what is of none of the source's.
      seed: of the choice of examples.

    Raises:
      InputError: for a single class, and domains whose classes have no name in common.
    """
    notes: list[str] = []
    how = {"data_dir": options.data_dir, "shape": shape, "resizing": resizing}
    pairs = {
        key: _source(options.source_part(name), notes.append, seed=seed, **how)
        for key, name in zip(options.keys, options.names, strict=True)
    }
    names = _union([train for train, _ in pairs.values()])
    if keeps or set(names) == set(known):
        names = tuple(known)
    if len(names) < 2:
        whose = ", ".join(options.names) or "the run"
        raise InputError(f"{whose} has one class, {_some(names)}; adaptation tells two or more apart")
    part = part_of(options.target, options.target_split, options.target_eval_split)
    target, test = _target(part, notes.append, **how)
    whose = "the run" if keeps else "the source"
    own, names = names, (*names, _UNKNOWN) if unknown else names
    sets = {key: tuple(one.as_classes(names, whose=whose) for one in pair) for key, pair in pairs.items()}
    labelled = None
    if _has_classes(target):
        _say_classes(target, own, whose, notes.append, unknown=unknown)
        if options.target_shots is not None:
            same = test is target or (test is not None and test.title == target.title)
            labelled, rest = _shots(target, names, options.target_shots, seed, whose, notes.append)
            test = rest if same else test
        elif labels:
            labelled = _testable(target, own, names, whose)
        test = None if test is None else _testable(test, own, names, whose)
        target = target.without("label")
    else:
        test = None
        notes.append("The target has no labels: what the run is worth there is not measured.")
        if labels or options.target_shots is not None:
            what = "this --method" if labels else "--target-shots"
            raise InputError(
                f"{what} learns from labels of the target, and {target.title} has none; leave it out, or sort its "
                f"images into class folders"
            )
    trains, held = ({key: pair[number] for key, pair in sets.items()} for number in (0, 1))
    shapes = {one.title: one.image_shape for one in (*trains.values(), target)}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{title} {image}" for title, image in shapes.items())
        raise InputError(f"the domains' images differ ({told}); add --image-shape to bring them to one")
    return Domains(trains, held, target, test, labelled, names, resizing, tuple(notes))


def common_shape(options: DomainOptions, usual: tuple[int, ...], how: Resizing) -> tuple[Any, bool, str]:
    """Returns the shape to which the domains' images are brought, whether a folder has several, and a sentence on it.

    Args:
      options: of the command line, checked.
      usual: what the network was made for, which all images get where those of the first source have several sizes.
      how: images of a folder of several sizes are brought to it; otherwise they are stretched.

    Returns:
      None, false and nothing where all images are of one shape.
    """
    words = [(name, options.split) for name in options.names] + [(options.target, options.target_split)]
    sets = [_opened(part_of(word, split, None), data_dir=options.data_dir) for word, split in words]
    odd = [jt.data.several_sizes(one) for one in sets]
    several = any(odd)
    if not several and len({one.image_shape for one in sets}) == 1:
        return None, False, ""
    channels = 3 if any(one.image_shape[2] > 1 for one in sets) else 1
    shape = (*(usual[:2] if odd[0] else sets[0].image_shape[:2]), channels)
    colour, told = "grey" if channels == 1 else "colour", how if several else STRETCH
    return shape, several, f"The domains' images differ, and are brought to {shape[0]} x {shape[1]}, {colour} ({told})."


def _opened(part: Part, split: str | None = None, *, data_dir: Any, shape: Any = None, resizing: Any = None) -> Any:
    if part.flat:
        return load_unlabelled(part.name.removeprefix(FOLDER), shape, resizing)
    return jt.data.load(part.name, split or part.train, data_dir=data_dir, image_shape=shape, resizing=resizing)


def _source(part: Part, say: Say, *, seed: int, **how: Any) -> tuple[jt.data.Dataset, jt.data.Dataset]:
    """Returns the examples of a source to train on and those held out, with the same classes."""
    train = _opened(part, **how)
    if not _has_classes(train):
        raise InputError(f"a source has a class for each image, and {train.title} has none; name it as the --target")
    held = _test_split(part, how)
    if held is None:
        train, held = jt.data.hold_out(train, _HELD_OUT, seed=seed)
        say(f"Of {part.name} ({part.train}) {len(held)} examples are held out to evaluate on.")
    return train, held.as_classes(train.class_names, whose=train.title)


def _target(part: Part, say: Say, **how: Any) -> tuple[jt.data.Dataset, jt.data.Dataset | None]:
    """Returns the examples to adapt to, and those to test on."""
    train = _opened(part, **how)
    if not _has_classes(train):
        return train, None
    test = _test_split(part, how)
    if test is None:
        say(f"The target is tested on the examples that it is adapted to, {train.title}.")
    return train, train if test is None else test


def _test_split(part: Part, how: dict[str, Any]) -> jt.data.Dataset | None:
    """Returns the split to test on; None where none was asked for and the usual one isn't there."""
    if part.test is None:
        return None
    try:
        return _opened(part, part.test, **how)
    except InputError:
        if part.asked:
            raise
        return None


def _union(sets: Sequence[jt.data.Dataset]) -> tuple[str, ...]:
    """Returns the names of the classes of all sources, in the order of the first."""
    names = tuple(sets[0].class_names) if sets else ()
    for one in sets[1:]:
        places = match_classes(one.class_names, names, of=one.title, whose=sets[0].title).places
        names += tuple(name for name, place in zip(one.class_names, places, strict=True) if place < 0)
    return names


def _say_classes(target: jt.data.Dataset, names: Sequence[str], whose: str, say: Say, *, unknown: bool) -> None:
    """Says which classes the target lacks, which it has besides, and where numbers decide.

    Raises:
      InputError: where it has none of the names.
    """
    found = match_classes(target.class_names, names, of=target.title, whose=whose)
    if not (found.places >= 0).any():
        raise InputError(
            f"no class of {target.name} is one of {whose}: {_some(target.class_names)} there, {_some(names)} here; "
            f"classes are matched by name, so name them alike"
        )
    if found.by_number:
        say(f"Class 0 of {whose}, {names[0]!r}, is class {target.class_names[found.places.argmin()]!r} of the target.")
    there = set(found.places.tolist())
    if missing := [name for number, name in enumerate(names) if number not in there]:
        say(f"{target.name} lacks {len(missing)} of the {len(names)} classes of {whose}: {_some(missing)}.")
    others = [name for name, place in zip(target.class_names, found.places, strict=True) if place < 0]
    if others:
        counted = f"are right where they are called {_UNKNOWN!r}" if unknown else "left out of the accuracy"
        say(
            f"{target.name} has {len(others)} classes that {whose} has not ({_some(others)}): their images are adapted "
            f"to as all others, and {counted}."
        )


def _testable(test: jt.data.Dataset, known: Sequence[str], names: Sequence[str], whose: str) -> jt.data.Dataset | None:
    """Returns the examples of known classes, with the labels of the run; None where there are none.

    Where the run has a class more than is known, the last one, all others are of that.
    """
    places = match_classes(test.class_names, known, of=test.title, whose=whose).places
    if len(names) > len(known):
        labels = np.where(places < 0, len(known), places)[test.labels].astype(np.int32)
        return test.without("label").with_columns({"label": labels}, class_names={"label": names})
    rows = np.flatnonzero(places[test.labels] >= 0)
    if not len(rows):
        return None
    return (test if len(rows) == len(test) else test.select(rows)).as_classes(names, whose=whose)


def _shots(
    target: jt.data.Dataset, names: Sequence[str], shots: int, seed: int, whose: str, say: Say
) -> tuple[jt.data.Dataset, jt.data.Dataset]:
    """Returns the target's labelled examples, with the labels of the run, and the others as they are."""
    places = match_classes(target.class_names, names, of=target.title, whose=whose).places
    labels, chosen = places[target.labels], []
    for label in range(len(names)):
        members = np.flatnonzero(labels == label)
        chosen.append(np.random.default_rng([seed, label]).permutation(members)[:shots])
    rows = np.sort(np.concatenate(chosen))
    if not len(rows):
        raise InputError(f"--target-shots: {target.title} has no example of a class that {whose} knows")
    fewer = [name for name, some in zip(names, chosen, strict=True) if 0 < len(some) < shots]
    if fewer:
        say(f"The target has fewer than {shots} examples of {_some(fewer)}; all of them are learned from.")
    say(f"{len(rows)} labelled examples of the target are learned from, {shots} per class.")
    rest = np.setdiff1d(np.arange(len(target)), rows)
    return target.select(rows).as_classes(names, whose=whose), target.select(rest)


def _has_classes(dataset: jt.data.Dataset) -> bool:
    return "label" in dataset.entries and dataset.entry_of("label").is_label


def _some(names: Sequence[str]) -> str:
    return shown(list(names))
