"""Rules of the house: who imports whom, docstrings of what is public, files of one idea."""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

import jaxtransfer as jt

ROOT = Path(jt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the bottom to the top: a room imports from the rooms of lower floors, of its own, and of those named beside it.
FLOORS = [
    {"errors", "version"},
    {
        "tree",
        "files",
        "formats",
        "parts.extra_arguments",
        "parts.learns",
        "parts.masking",
        "parts.split_statistics",
        "parts.view",
        "resizing",
    },
    {"loss_scale", "parts.twins", "parts.gradient_averages", "texts"},
    {"model", "narrow_weights"},
    {"weights"},
    {"losses", "forward", "micro_batches", "devices"},
    {"context"},
    {"terms", "parts.mixing"},
    {"objective"},
    {"parts.rows", "parts.outputs", "parts.together", "parts.label_matrix", "parts.learned_weights", "deltas"},
    {"objectives", "optim", "schedules", "meta", "multitask", "runs"},
    {"measures", "fusion"},  # fusion is of trees (test_fusion_is_of_trees), but for the objective of AdaMerging
    {"train", "representation", "pretrained"},  # sides of one floor: none imports another
    {"adaptation"},
    {"methods"},
    {"cli"},
    {"former"},
    {"__init__", "__main__"},
]
ASIDE = {
    "models": {"errors", "formats", "model", "tree", "weights"},
    "data": {"devices", "errors", "files", "model", "resizing", "texts"},
}  # meet the rest only above
MEETS = {"runs": {"models"}, "pretrained": {"models"}}  # a run says how its model is made
MEETING_PLACES = {"cli", "__init__", "__main__"}


def room_of(module: str) -> str:
    """The room that a module stands in; in `parts/` each file is one, for the heart stands on some and below others."""
    parts = module.split(".")
    if parts[1:2] == ["parts"]:
        return ".".join(parts[1:3])
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = ("jaxtransfer", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def each_of(paths: list[Path]):
    """Makes one test of a check of each file, which tells all that fail: 1,200 take longer to count than to run."""

    def decorate(check):
        def test():
            failed = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    failed.append(f"{path}: {error}")
            assert not failed, "\n".join(failed)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@functools.cache
def imports(path: Path) -> set[str]:
    """All modules that a file imports, inside of functions too; `from jaxtransfer import x` is `jaxtransfer.x`."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "jaxtransfer":
                found |= {
                    f"jaxtransfer.{alias.name}" if (ROOT / alias.name).exists() or (ROOT / f"{alias.name}.py").exists()
                    else "jaxtransfer"
                    for alias in node.names
                }  # fmt: skip
            else:
                found.add(node.module)
    return found


def own_imports(path: Path) -> set[str]:
    """The rooms of the package that a file imports."""
    return {room_of(name) for name in imports(path) if name.split(".")[0] == "jaxtransfer"}


def floor_of(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise AssertionError(f"jaxtransfer/{room} stands on no floor: name its place in tests/test_house.py")


def test_the_search_sees_imports():
    assert own_imports(ROOT / "train" / "loop.py") >= {"objective", "train", "errors"}
    assert own_imports(ROOT / "objectives" / "anchored" / "anchors.py") >= {"losses", "tree", "objective"}
    assert own_imports(ROOT / "__main__.py") == {"cli"}
    assert "flax.linen" in imports(ROOT / "models" / "mlp.py")
    assert len(FILES) > 40


@each_of(FILES)
def test_imports_point_downwards(path):
    room, used = room_of(module_of(path)), own_imports(path)
    if room in ASIDE:
        assert used <= ASIDE[room] | {room}, f"{path} imports {used}"
        return
    for other in used - {room}:
        if other in ASIDE:
            assert room in MEETING_PLACES or other in MEETS.get(room, ()), f"{path} imports {other}"
        elif other == "__init__":
            assert room in MEETING_PLACES, f"{path} imports the whole package"
        else:
            assert floor_of(other) < floor_of(room), f"{path}: {room} imports {other}, which stands above or beside it"


MODELS_TOO = {"ada_merging", "gram_matrices", "statistics", "__init__"}  # files of fusion that know models, too


@each_of(sorted((ROOT / "fusion").glob("*.py")))
def test_fusion_is_of_trees(path):
    assert path.stem in MODELS_TOO or own_imports(path) <= {"errors", "tree", "fusion"}, own_imports(path)


EXPERIMENTS = sorted((ROOT.parent / "experiments").rglob("*.py"))


@each_of(EXPERIMENTS)
def test_an_experiment_uses_the_library_and_no_command(path):
    assert len(EXPERIMENTS) > 10
    assert "cli" not in own_imports(path), f"{path}: what it borrows from cli/ belongs to the library"


@each_of(FILES)
def test_flax_stays_with_the_models(path):
    if room_of(module_of(path)) != "models":
        assert not {name for name in imports(path) if name.split(".")[0] == "flax"}


@each_of(FILES)
def test_a_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) < 350
    assert ast.get_docstring(parsed(path)), f"{path} has no docstring"


def kinds_asked_for(source: str) -> set[str]:
    """The kinds of weights that a file asks about: names in `isinstance(x, ...)`, `type(x) is ...` and in patterns."""
    kinds, found = {"Frozen", "FrozenModel", "Average", "Trained"}, set()

    def names(node):
        inner = {getattr(one, "id", getattr(one, "attr", None)) for one in ast.walk(node)}
        return {name for name in inner if name in kinds}

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            found |= names(node.args[1])
        elif isinstance(node, ast.Compare | ast.MatchClass):
            found |= names(node)
    return found


@each_of(FILES)
def test_kinds_of_weights_are_told_apart_in_one_room(path):
    if room_of(module_of(path)) != "weights":
        assert not kinds_asked_for(path.read_text()), f"{path}: ask jaxtransfer.weights, or the weights themselves"


def test_the_search_sees_questions():
    asked = "isinstance(x, jt.Average | Peer)", "type(x) is Frozen", "isinstance(x, (FrozenModel, Model))"
    assert [kinds_asked_for(line) for line in asked] == [{"Average"}, {"Frozen"}, {"FrozenModel"}]
    assert kinds_asked_for((ROOT / "weights" / "__init__.py").read_text())


def public_names():
    """(name, object) of everything that a user can reach and call, with the public methods of the classes."""
    found = {}
    for name in jt.__all__:
        found[f"jt.{name}"] = getattr(jt, name)
    for room in (jt.losses, jt.models, jt.data, jt.optim, jt.methods, jt.adaptation, jt.fusion, jt.deltas, jt.tree):
        names = getattr(room, "__all__", [name for name in vars(room) if not name.startswith("_")])
        for name in names:
            found[f"{room.__name__}.{name}"] = getattr(room, name)
    for path in FILES:
        if path.stem.startswith("__main__"):
            continue
        module = importlib.import_module(module_of(path).removesuffix(".__init__"))
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__:
                found[f"{module.__name__}.{name}"] = thing
    for name, thing in list(found.items()):
        if inspect.isclass(thing):
            for attribute, member in vars(thing).items():
                own = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
                field = attribute in getattr(thing, "__dataclass_fields__", ())  # told of in the class's docstring
                if own and not field and not attribute.startswith("_"):
                    found[f"{name}.{attribute}"] = member
    return {
        name: thing
        for name, thing in found.items()
        if inspect.isclass(thing)
        or inspect.isroutine(thing)
        or inspect.ismodule(thing)
        or isinstance(thing, property | classmethod | staticmethod)
    }


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def test_public_names_have_docstrings_that_say_more_than_the_name():
    names, poor = public_names(), []
    assert {"jt.fit", "jaxtransfer.losses.l2_sp", "jaxtransfer.objective.Objective.on"} <= names.keys()
    for name, thing in names.items():
        origin = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", "jaxtransfer")
        if not origin.startswith("jaxtransfer"):
            continue
        inherited = inspect.isclass(thing) and "__doc__" not in vars(thing)
        text = "" if inherited else (getattr(thing, "__doc__", None) or "")
        own = set(words(name.split(".")[-1].replace("_", " ")))
        said = [word for word in words(text) if word not in own and word not in {"the", "a", "an", "of", "returns"}]
        generated = inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")  # what dataclasses write
        if not said or generated:
            poor.append(f"{name}: {text!r}")
    assert not poor, "\n".join(poor)


def test_what_the_faces_promise_is_there():
    for room in (jt, jt.losses, jt.data, jt.measures, jt.adaptation, jt.fusion, jt.deltas):
        assert sorted(room.__all__) == list(dict.fromkeys(sorted(room.__all__)))
        for name in room.__all__:
            assert hasattr(room, name), name


def test_files_of_tests_have_names_of_their_own():
    """In folders that are no packages two modules of one name can't be collected together."""
    names = [
        path.name for path in ROOT.parent.joinpath("tests").rglob("*.py") if path.stem not in ("conftest", "__init__")
    ]
    assert sorted(names) == sorted(set(names))
