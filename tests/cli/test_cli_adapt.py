"""`adapt` takes domains as they are, looks at no label of the target unless asked, and says what it did."""

import hashlib
import itertools
import json

import cv2
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.domain_names import part_of
from jaxtransfer.cli.domains import DomainOptions, common_shape, load_domains
from jaxtransfer.cli.registry.adaptation import METHODS, SELECTIONS
from jaxtransfer.cli.registry.row import listed
from tests.cli.test_cli_registry import help_of

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "owl": (30, 30, 200), "cow": (200, 200, 30)}
SMALL = ("--steps", "2", "--batch-size", "8", "--model", "linear", "--eval-every", "2")


@pytest.fixture
def domain(tmp_path):
    """Makes a folder of images in class folders; of a class the colour or brightness shows."""

    def make(name, classes=("cat", "dog", "owl"), *, each=8, shape=(8, 8), grey=False, flat=False, seed=0):
        rng = np.random.default_rng(seed)
        for place, label in enumerate(classes):
            folder = tmp_path / name / ("" if flat else label)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(each):
                noise = rng.integers(0, 40, (*shape, 3))
                image = np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)
                image = image.mean(axis=2).astype(np.uint8) if grey else image
                assert cv2.imwrite(str(folder / f"{place}-{number}.png"), image)
        return f"folder:{tmp_path / name}"

    return make


def weights_of(out):
    return jt.load_run(out).params["model"]


def same(one, other):
    flat = [jt.tree.leaves_by_path(tree) for tree in (one, other)]
    return flat[0].keys() == flat[1].keys() and all(np.array_equal(flat[0][path], flat[1][path]) for path in flat[0])


@pytest.mark.slow
def test_domains_of_other_sizes_colours_and_classes_run_as_they_are(run, domain, tmp_path):
    """Grey against colour, 10 x 12 against 8 x 8, classes in another order, one missing, one more, 30 images."""
    source = domain("source", ("cat", "dog", "owl"), each=20, shape=(10, 12), grey=True)
    target = domain("target", ("owl", "cow", "cat"), each=10, seed=1)
    out = tmp_path / "out"
    words = ("adapt", "--source", source, "--target", target, "--method", "mcc", *SMALL, "--out", out)
    lines, err = run(*words)
    told = "\n".join(err)
    assert "brought to 10 x 12, colour (stretched, area)" in told
    assert f"{target} lacks 1 of the 3 classes of the source: dog." in told
    assert f"{target} has 1 classes that the source has not (cow)" in told
    assert lines[-1].startswith("target accuracy ")
    assert "(source only " in lines[-1]
    report = (out / "report.md").read_text()
    assert "no label of the target chose it" in report
    assert "| target accuracy |" in report
    assert "lacks 1 of the 3 classes" in report
    assert "| domain gap (proxy A-distance, 0 to 2) |" in report
    assert "(Jin 2020)" in report
    assert cv2.imread(str(out / "domains.png")) is not None
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 2
    assert result["chosen on"] is None
    assert result["test on"] == f"{target} (test)"
    assert result["test"].keys() >= {"target/accuracy", "source/accuracy", "source only: target/accuracy"}
    config = json.loads((out / "config.json").read_text())
    assert config["class_names"] == ["cat", "dog", "owl"]
    assert config["image_shape"] == [10, 12, 3]
    # other commands take it for any other run
    evaluated = json.loads(run("evaluate", out, "--data", source)[0][0])
    assert evaluated["accuracy"] == pytest.approx(result["test"]["source/accuracy"])
    # the same command again finds all done
    before = weights_of(out)
    assert run(*words)[0][0].startswith("already done: ")
    assert same(weights_of(out), before)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--target", "digits/noisy"), "--method source-only learns from a source; name it: --source"),
        (("--source", "digits/upright"), "adapt needs --target NAME"),
        (("--source", "digits/upright", "--sources", "digits/noisy", "--target", "x"), "give one of them"),
        (("--sources", "digits/noisy", "digits/noisy", "--target", "x"), "expected each domain once"),
        (("--source", "digits/upright", "--target", "digits/nosy"), "unknown data set 'digits/nosy' (did you mean"),
        (("--method", "dannn"), "unknown method 'dannn'"),
        (("--select", "sdn"), "unknown select 'sdn' (did you mean 'snd'?)"),
        (("--strength", "2"), "--strength: source-only has none"),
        (("--patience", "2"), "say by which: --select"),
        (("--compare", "nowhere"), "--compare takes source-only, none or a run directory; there is no nowhere"),
        (("--target-shots", "0"), "--target-shots must be at least 1; got 0"),
        (("--target-shots", "2", "--method", "oracle"), "oracle learns from all labels"),
        (("--from", "nowhere", "--image-shape", "8", "8", "1"), "leave it out"),
        (("--crop", "0.9"), "add --image-shape"),
        (("--source", "digits/upright@", "--target", "digits/noisy"), "expected NAME, or NAME@SPLIT"),
        (("--split", "tran"), "unknown split of digits/upright 'tran'"),
        (("--eval-split", "tst"), "unknown split of digits/upright 'tst'"),
        (("--source", "digits/noisy", "--target", "digits/noisy"), "its labels would be learned from"),
        (("--source", "digits/noisy@test", "--target", "digits/noisy"), "its labels would be learned from"),
        (("--method", "mcd", "--label-smoothing", "0.1"), "--label-smoothing 0.1: mcd has no use for it; leave it out"),
        (("--method", "pada", "--augment", "flip", "mixup"), "--augment mixup: pada has no use for it"),
        (("--method", "tent", "--from", "x", "--balance", "classes"), "--balance classes: tent has no use for it"),
        (
            ("--target", "x", "--method", "shot", "--from", "x", "--eval-split", "test"),
            "of the source, and there is no",
        ),
        (("--target-eval-split", "tst"), "unknown split of digits/noisy 'tst'"),
    ],
)
def test_what_it_refuses(refused, tmp_path, words, expected):
    whole = ("--source", "digits/upright", "--target", "digits/noisy")
    base = () if {"--source", "--target", "--sources"} & set(words) else whole
    assert expected in refused("adapt", *base, *SMALL, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_domains_that_do_not_go_together_are_one_clear_line(refused, domain, tmp_path):
    known, others, alone = (
        domain(name, classes, each=5)
        for name, classes in (("known", ("cat", "dog")), ("others", ("owl", "cow")), ("alone", ("cat",)))
    )
    flat = domain("flat", ("cat", "dog"), each=5, flat=True)
    end = (*SMALL, "--out", tmp_path / "out")
    message = refused("adapt", "--source", known, "--target", others, *end)
    assert f"no class of {others} is one of the source: cow, owl there, cat, dog here" in message
    assert "has one class, cat" in refused("adapt", "--source", alone, "--target", known, *end)
    assert "a source has a class for each image" in refused("adapt", "--source", flat, "--target", known, *end)
    unlabelled = ("adapt", "--source", known, "--target", flat, *end)
    assert "has no splits" in refused(*unlabelled, "--target-eval-split", "test")
    same = f"folder:{tmp_path}/./known/"
    assert "is a source, too" in refused("adapt", "--source", known, "--target", same, *end)
    assert "--target-shots learns from labels of the target" in refused(*unlabelled, "--target-shots", "1")
    assert "this --method learns from labels of the target" in refused(*unlabelled, "--method", "oracle")
    assert "--select target-labels reads the target's labels" in refused(*unlabelled, "--select", "target-labels")
    assert not (tmp_path / "out").exists()


def test_the_lists_of_help_are_the_registries(capsys):
    text = help_of(capsys, "adapt")
    for registry in (METHODS, SELECTIONS):
        assert " ".join(listed(registry).split()) in text


def test_a_domain_is_a_name_with_a_split_after_it(tmp_path):
    assert part_of("emoji@noto", "train", None) == ("emoji", "noto", None, False)
    assert part_of("emoji@noto", "train", "fluent") == ("emoji", "noto", "fluent", True)
    assert part_of("mnist", "train", None) == ("mnist", "train", "test", False)
    assert part_of("folder:/a@b/c", "train", None).name == "folder:/a@b/c"
    (tmp_path / "x@y").mkdir()
    assert part_of(f"folder:{tmp_path}/x@y", "train", None).train == "train"
    assert part_of(f"folder:{tmp_path}/x@all", "train", None)[:2] == (f"folder:{tmp_path}/x", "all")


def loaded(*, known=(), shape=None, keeps=False, seed=0, **options):
    return load_domains(DomainOptions(**options), shape, None, known=known, keeps=keeps, seed=seed)


def test_labels_are_those_of_the_run_by_name(domain):
    first = domain("first", ("cat", "dog"), each=10)
    second = domain("second", ("cow", "dog"), each=10, seed=1)
    target = domain("target", ("cow", "cat", "dog"), each=10, seed=2)
    found = loaded(sources=(first, second), target=target)
    assert found.test is not None
    assert found.class_names == ("cat", "dog", "cow")
    assert list(found.sources) == list(found.held) == ["source1", "source2"]
    images = {label: set() for label in range(3)}
    for one in (*found.sources.values(), *found.held.values(), found.test):
        assert one.class_names == found.class_names
        batch = one.read(np.arange(len(one)))
        for image, label in zip(batch["image"], batch["label"], strict=True):
            images[int(label)].add(tuple(image.reshape(-1, 3).mean(axis=0) > 120))
    assert all(len(colours) == 1 for colours in images.values())  # of the class, whatever its number in the folder
    assert "label" not in found.target.entries
    assert "label" not in jt.data.pipeline(found.target, 4).batch(0)
    assert found.notes == ()
    assert loaded(source=first, target=target, known=("dog", "cat")).class_names == ("dog", "cat")
    assert loaded(source=first, target=target, known=("dog", "owl")).class_names == ("cat", "dog")


def test_labelled_target_examples_are_drawn_by_the_seed_and_are_not_tested_on(domain):
    source, target = domain("source", ("cat", "dog"), each=10), domain("target", ("dog", "cat"), each=4, seed=1)
    found = loaded(source=source, target=f"{target}@all", target_shots=2)
    assert found.test is not None
    assert found.labelled is not None
    assert sorted(found.labelled.labels) == [0, 0, 1, 1]
    assert len(found.target) == 8
    assert len(found.test) == 4
    rows = {name: {image.tobytes() for image in one.read(np.arange(len(one)))["image"]} for name, one in
            (("labelled", found.labelled), ("test", found.test), ("target", found.target))}  # fmt: skip
    assert not rows["labelled"] & rows["test"]
    assert rows["labelled"] | rows["test"] == rows["target"]
    assert any("tested on the examples that it is adapted to" in note for note in found.notes)
    others = [loaded(source=source, target=f"{target}@all", target_shots=2, seed=seed).labelled for seed in (0, 1, 2)]
    drawn = [{image.tobytes() for image in one.read(np.arange(4))["image"]} for one in others if one is not None]
    assert drawn[0] == rows["labelled"]
    assert drawn[1:] != [drawn[0]] * 2
    more = loaded(source=source, target=f"{target}@all", target_shots=9)
    assert more.labelled is not None
    assert len(more.labelled) == 8
    assert any("fewer than 9 examples of" in note for note in more.notes)
    assert more.test is None


def test_several_data_sets_are_a_table(run, refused, domain, source, tmp_path):
    out = tmp_path / "out"
    names = ("digits/noisy", "digits/inverted")
    lines, err = run("evaluate", source, "--split", "test[:40]", "--out", out, "--data", *names)
    facts = [json.loads(line) for line in lines]
    assert [one["data"] for one in facts] == list(names)
    table = [line for line in err if line.startswith("│")]
    assert len(table) == 3
    assert [row.split()[1] for row in table] == [*names, "mean"]
    written = json.loads((out / "evaluation.json").read_text())
    assert [one["data"] for one in written] == [*names, "mean"]
    assert written[2]["accuracy"] == pytest.approx((facts[0]["accuracy"] + facts[1]["accuracy"]) / 2)
    assert json.loads((out / "1-digits-noisy" / "evaluation.json").read_text())["data"] == names[0]
    # one stays as it was, also with the run after it
    alone = run("evaluate", "--split", "test[:40]", "--data", names[0], source)[0]
    assert alone == [lines[0]]
    assert run("evaluate", "--data", f"{names[0]}@test[:40]", source)[0] == alone  # a split of its own
    late = ("evaluate", source, "--resize", "--out", tmp_path / "late", "--data", names[0], domain("cats"))
    assert "name the classes alike" in refused(*late)
    assert not list((tmp_path / "late").iterdir())  # before the first of them is evaluated
    assert "expected each data set once" in refused("evaluate", source, "--data", names[0], names[0])


def test_images_of_several_sizes_get_that_of_the_first_source(domain, tmp_path):
    plain, odd = domain("plain", shape=(12, 12)), domain("odd", shape=(16, 16), seed=1)
    assert cv2.imwrite(str(tmp_path / "odd" / "cat" / "wide.png"), np.full((9, 30, 3), 90, np.uint8))
    shapes = [
        common_shape(DomainOptions(source=source, target=target), (8, 8, 1), jt.data.Resizing())[:2]
        for source, target in ((plain, odd), (odd, plain))
    ]
    assert shapes == [((12, 12, 3), True), ((8, 8, 3), True)]


@pytest.mark.slow
def test_mixed_images_join_those_of_the_target(run, domain, tmp_path):
    source, target, out = domain("source"), domain("target", seed=1), tmp_path / "out"
    words = ("adapt", "--source", source, "--target", target, *SMALL, "--compare", "none", "--method", "mcc")
    run(*words, "--augment", "mixup", "cutmix", "--out", out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(one["train/mcc"]) for one in records if "train/mcc" in one)
    # what is compared with nothing by itself is compared where that is asked for
    lines, _ = run(*words, "--method", "source-only", "--compare", out, "--out", tmp_path / "alone")
    assert f"({out} " in lines[-1]


def placed(number, folders):
    """A file name by which an image is that of its number in folders of any class; they are ordered by hashes."""
    for tried in itertools.count():
        name = f"{number:02}-{tried}.png"
        digests = [hashlib.sha256(f"{folder}/{name}".encode()).digest()[0] for folder in folders]
        if all(digest * 12 // 256 == number for digest in digests):
            return name


@pytest.mark.slow
def test_the_labels_of_the_target_change_no_weight(run, domain, tmp_path):
    """The same images in the same order, all of them in some class, and without a label."""
    source, images = domain("source"), np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    for number, image in enumerate(images):
        label = ("cat", "dog", "owl")[number % 3]
        name = placed(number, (label,))
        for folder in (f"classes/train/{label}", f"classes/test/{label}", "flat"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(tmp_path / folder / name), image)
    words = ("adapt", "--source", source, "--method", "mcc", *SMALL, "--select", "snd", "--compare", "none")
    for name in ("classes", "flat"):
        run(*words, "--target", f"folder:{tmp_path / name}", "--out", tmp_path / "out" / name)
    assert same(*(weights_of(tmp_path / "out" / name) for name in ("classes", "flat")))


@pytest.mark.slow
def test_several_sources_few_labels_a_score_and_seeds(run, refused, domain, tmp_path):
    first, second = domain("first", ("cat", "dog")), domain("second", ("owl", "dog"), seed=1)
    target, out = domain("target", seed=2), tmp_path / "out"
    words = ("adapt", "--sources", first, second, "--target", target, "--target-shots", "2", "--method", "bnm", *SMALL)
    _, err = run(*words, "--select", "dev", "--patience", "3", "--tsne", "--seeds", "0", "1", "--out", out)
    assert "6 labelled examples of the target are learned from, 2 per class." in "\n".join(err)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["chosen on"].endswith(f"{target} (train) without its labels")
    assert len(summary["test"]["target/accuracy"]["values"]) == 2
    report = (out / "seed-0" / "report.md").read_text()
    assert "The step was chosen by dev (" in report
    assert "no label of the target took part" in report
    assert "t-SNE" in report
    assert "| source2/accuracy |" in report
    records = [json.loads(line) for line in (out / "seed-1" / "metrics.jsonl").read_text().splitlines()]
    assert any("train/labelled/accuracy" in one and "train/source2/accuracy" in one for one in records)
    assert "| dev |" in report
    asked = (*words, "--select", "target-labels", "--compare", out / "seed-0", "--out", tmp_path / "asked")
    run(*asked)
    report = (tmp_path / "asked" / "report.md").read_text()
    assert "too good for a target without labels" in report
    assert str(out / "seed-0") in report
    other = domain("animals", ("cat", "cow"))
    asked = ("adapt", "--source", other, "--target", target, *SMALL, "--method", "mcc", "--compare", out / "seed-0")
    assert "has other classes than this run" in refused(*asked, "--out", tmp_path / "other")


@pytest.mark.slow
def test_an_unlabelled_folder_of_several_sizes_from_a_run_of_the_same_classes(run, domain, tmp_path):
    source, flat = domain("source"), domain("flat", flat=True, seed=1)
    assert cv2.imwrite(str(tmp_path / "flat" / "wide.png"), np.full((9, 30, 3), 90, np.uint8))
    out = tmp_path / "out"
    words = (
        "adapt",
        "--source",
        source,
        "--target",
        flat,
        "--method",
        "mcc",
        *SMALL,
        "--model",
        "mlp",
        "--compare",
        "none",
    )
    lines, err = run(*words, "--out", out)
    assert "The target has no labels" in "\n".join(err)
    assert lines[-1].startswith("domain gap ")
    assert "crop 0.875, bilinear" in "\n".join(err)  # as any folder of images of several sizes
    assert "target accuracy" not in (out / "report.md").read_text()
    assert not (out / "source-only").exists()
    assert json.loads(run("evaluate", out)[0][0])["data"] == source
    started = tmp_path / "started"
    words = ("adapt", "--target", flat, "--from", out, "--batch-size", "8", "--compare", "none")
    run(*words, "--source", source, "--steps", "1", "--lr", "1e-9", "--method", "bnm", "--out", started)
    for path, leaf in jt.tree.leaves_by_path(weights_of(out)).items():
        np.testing.assert_allclose(leaf, jt.tree.leaves_by_path(weights_of(started))[path], atol=1e-6)
    config = json.loads((started / "config.json").read_text())
    assert config["image_shape"] == jt.load_run(out).config["image_shape"]
    fresh = tmp_path / "fresh"
    fewer = domain("fewer", ("cat", "dog"))
    run(*words, "--source", fewer, "--steps", "1", "--out", fresh)
    assert jt.load_run(fresh).class_names == ("cat", "dog")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(run, domain, tmp_path):
    words = ("adapt", "--source", domain("source"), "--target", domain("target", seed=1), "--method", "mcc")
    words += ("--batch-size", "8", "--model", "linear", "--eval-every", "2", "--compare", "none")
    run(*words, "--steps", "4", "--schedule", "constant", "--out", tmp_path / "a")
    run(*words, "--steps", "2", "--schedule", "constant", "--out", tmp_path / "b")
    run(*words, "--steps", "4", "--schedule", "constant", "--out", tmp_path / "b")
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


ADAPTING = [name for name, row in METHODS.items() if row.facts.adapts and not row.facts.source_free]


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTING)
def test_each_method_trains_on_one_source_or_two(run, refused, domain, tmp_path, method):
    facts = METHODS[method].facts
    sources, target = [domain(name) for name in ("a", "b")], domain("target", ("owl", "cow", "cat"), each=5, seed=1)
    words = ("adapt", "--target", target, "--method", method, "--compare", "none", *SMALL[:4], "--model", "mlp")
    out = tmp_path / "out"
    if facts.several:
        assert "is of several sources" in refused(*words, "--source", sources[0], "--out", out)
    if facts.one_source:
        assert "takes one source" in refused(*words, "--sources", *sources, "--out", out)
        run(*words, "--source", sources[0], "--out", out)
    else:
        run(*words, "--sources", *sources, *(() if facts.turns else ("--target-shots", "1")), "--out", out)
    result = json.loads((out / "result.json").read_text())
    keys = {"source/accuracy"} if facts.one_source else {"source1/accuracy", "source2/accuracy"}
    assert {*keys, "target/accuracy"} <= result["test"].keys()
    assert jt.load_run(out).class_names == ("cat", "dog", "owl", *(["unknown"] if facts.unknown else []))


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.facts.source_free])
def test_without_the_source(run, refused, domain, tmp_path, method):
    """A run goes on with images of the target alone; a source, where one is named, is only measured."""
    source, target = domain("source"), domain("target", ("dog", "cat"), seed=1)
    first, out = tmp_path / "first", tmp_path / "out"
    words = ("adapt", "--target", target, *SMALL[:4], "--method", method, "--out", out)
    assert "name it: --from RUN" in refused(*words)
    run("pretrain", "--data", source, *SMALL[:4], "--out", first)
    lines, _ = run(*words, "--from", first)
    assert "before adaptation" in lines[-1]
    assert jt.load_run(out).class_names == ("cat", "dog", "owl")
    moved = jt.tree.leaves_by_path(weights_of(out))
    same_as_before = {k for k, v in jt.tree.leaves_by_path(weights_of(first)).items() if np.array_equal(v, moved[k])}
    assert any("head" in path for path in same_as_before)
    assert len(same_as_before) < len(moved)
    lines, _ = run(*words[:-1], tmp_path / "with", "--from", first, "--source", source)
    assert "domain gap" in lines[-1]
    others = domain("others", ("owl", "cow"))
    message = refused(*words[:-1], tmp_path / "others", "--from", first, "--source", others)
    assert "the run has no class 'cow'" in message
