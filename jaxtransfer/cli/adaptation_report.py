"""What a run of `adapt` came to: beside what it is compared with, and as a picture of both domains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jaxtransfer as jt
from jaxtransfer import representation
from jaxtransfer.cli.domain_scores import ACCURACY, GAP, DomainScores
from jaxtransfer.cli.domains import Domains
from jaxtransfer.cli.registry.adaptation import METHODS, SELECTIONS
from jaxtransfer.cli.runs import Run, load_run
from jaxtransfer.errors import InputError
from jaxtransfer.runs.report import write_report
from jaxtransfer.runs.result import write_result

_PICTURE = "domains.png"
_NAMES = {ACCURACY: "target accuracy", GAP: "domain gap (proxy A-distance, 0 to 2)"}


class Before(NamedTuple):
    """What adaptation is compared with.

    Attributes:
      title: what it is called.
      scores: by metric.
      drawn: features of both domains; None without a source.
    """

    title: str
    scores: dict[str, float]
    drawn: Any


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      out: its directory.
      method: by which it adapted.
      select: how its step was chosen.
      fitted: what training gave.
      before: what it is compared with; None for nothing.
      measure: its scores.
      domains: the data.
    """

    out: Path
    method: str
    select: str
    fitted: jt.Fitted
    before: Before | None
    measure: DomainScores
    domains: Domains


def check_comparable(run: Run, domains: Domains) -> None:
    """Raises for a run of other classes or images than the domains'."""
    for name, there, here in (
        ("classes", run.class_names, domains.class_names),
        ("images", run.image_shape, domains.target.image_shape),
    ):
        if there != here:
            raise InputError(
                f"{run.directory} has other {name} than this run ({there}, {here}); take another --compare"
            )


def before_of(run: Run, title: str, measure: DomainScores) -> Before:
    """Returns a run to compare with, measured on the same examples."""
    check_comparable(run, measure.domains)
    own = measure.of(run.model)
    return Before(title, own(run), own.drawn(run))


def reported(outcome: Outcome, facts: Mapping[str, Any], *, tsne: bool) -> tuple[Path, str]:
    """Writes the report, the picture and `result.json`; returns the report's path, and a line for the console.

    Args:
      outcome: of the run.
      facts: its configuration, for the report.
      tsne: whether to draw by t-SNE.
    """
    run, before = load_run(outcome.out), outcome.before
    scores = dict(run.result)
    pictures = _draw(outcome, run, tsne=tsne)
    rows = [
        [_NAMES.get(name, name), *([] if before is None else [before.scores.get(name)]), value]
        for name, value in sorted(scores.items(), key=lambda item: (item[0] != ACCURACY, item[0]))
    ]
    header = ["", *([] if before is None else [before.title]), f"{outcome.method}, step {run.step}"]
    metric = SELECTIONS[outcome.select].facts.metric
    paper = METHODS[outcome.method].paper
    page = write_report(
        outcome.out,
        f"{outcome.method}{f' ({paper})' if paper else ''}: {_names(outcome.domains)}",
        facts,
        tables=[("What adaptation came to", header, rows)],
        pictures=pictures,
        monitor=metric,
        note=" ".join([_chosen(outcome), *outcome.domains.notes]),
    )
    test = outcome.domains.test
    result: dict[str, Any] = {
        "step": run.step,
        "chosen on": _chosen_on(outcome),
        "chosen by": {} if metric is None else {metric: scores[metric]},
        "test on": None if test is None else test.title,
        "test": scores | ({} if before is None else {f"{before.title}: {k}": v for k, v in before.scores.items()}),
    }
    write_result(outcome.out, result)
    return page, _told(scores, before)


def _names(domains: Domains) -> str:
    sources = ", ".join(one.name for one in domains.sources.values())
    return f"{sources} to {domains.target.name}" if sources else f"to {domains.target.name}"


def _chosen_on(outcome: Outcome) -> str | None:
    facts = SELECTIONS[outcome.select].facts
    if facts.metric is None:
        return None
    if facts.target_labels:
        assert outcome.domains.test is not None
        return outcome.domains.test.title
    source = ", ".join(one.title for one in outcome.domains.held.values()) if facts.source else ""
    return ", ".join(filter(None, [source, f"{outcome.domains.target.title} without its labels"]))


def _chosen(outcome: Outcome) -> str:
    """Returns what a report says of how the step was chosen."""
    test, facts = outcome.domains.test, SELECTIONS[outcome.select].facts
    where = "" if test is None else f" The target's accuracy is on {test.title}, {len(test)} examples."
    if facts.metric is None:
        return f"The last step is the result: no label of the target chose it.{where}"
    if facts.target_labels:
        return (
            f"The step was chosen by the target's labels, as asked (--select {outcome.select}), on the examples that "
            f"it is tested on: what stands here is too good for a target without labels.{where}"
        )
    return f"The step was chosen by {facts.metric} ({_chosen_on(outcome)}); no label of the target took part.{where}"


def _draw(outcome: Outcome, run: Run, *, tsne: bool) -> dict[str, str]:
    """Draws the features of both domains; returns the picture by its title."""
    after, pairs = outcome.measure.drawn(run), {}
    if outcome.before is not None and outcome.before.drawn is not None:
        pairs[outcome.before.title] = outcome.before.drawn
    if after is not None:
        pairs[outcome.method] = after
    pairs = {
        title: pair
        for title, pair in pairs.items()
        if pair[0].features.shape[1] > 1 and len(pair[0].features) + len(pair[1].features) > 2
    }
    if not pairs:
        return {}
    method = None
    if tsne:
        from sklearn.manifold import TSNE

        fewest = min(len(pair[0].features) + len(pair[1].features) for pair in pairs.values())
        method = TSNE(init="pca", random_state=0, perplexity=min(30.0, (fewest - 1) / 3))
    path = outcome.out / _PICTURE
    representation.plot_domains(pairs, path, names=outcome.domains.class_names, method=method)
    return {f"Features of both domains, {'t-SNE' if tsne else 'principal components'}": path.name}


def _told(scores: Mapping[str, float], before: Before | None) -> str:
    """Returns the line that the console gets."""
    parts = []
    for name in (ACCURACY, GAP):
        if name in scores:
            beside = (
                "" if before is None or name not in before.scores else f" ({before.title} {before.scores[name]:.4g})"
            )
            parts.append(f"{_NAMES[name].partition(' (')[0]} {scores[name]:.4g}{beside}")
    return ", ".join(parts) or "the target has no labels, and there is no source to compare it with"
