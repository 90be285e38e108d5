import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

TREE = {
    "student": {"stem_conv": {"kernel": 1.0}, "stage1_conv": {"kernel": 2.0, "bias": 3.0}, "head": {"kernel": 4.0}},
    "other": {"headless": {"kernel": 5.0}, "stage12": [6.0, 7.0]},
}
PATHS = [  # in the order of the tree, which sorts keys
    "other/headless/kernel",
    "other/stage12/0",
    "other/stage12/1",
    "student/head/kernel",
    "student/stage1_conv/bias",
    "student/stage1_conv/kernel",
    "student/stem_conv/kernel",
]


def test_paths_join_the_keys_of_every_kind_of_node():
    assert list(jt.tree.leaves_by_path(TREE)) == PATHS
    assert list(jt.tree.leaves_by_path(TREE).values()) == [5, 6, 7, 4, 3, 2, 1]
    pair = collections.namedtuple("pair", "left right")
    assert jt.tree.leaves_by_path({"a": pair(1, [2, {"b": 3}])}) == {"a/left": 1, "a/right/0": 2, "a/right/1/b": 3}
    assert jt.tree.leaves_by_path({"a": {}, "b": None}) == {}


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        ("head", [3]),
        ("student", [3, 4, 5, 6]),
        ("kernel", [0, 3, 5, 6]),
        ("head/kernel", [3]),
        ("student/head", [3]),
        ("stage1", []),  # no part of a key
        ("stage1_.*", [4, 5]),
        ("stage1.*", [1, 2, 4, 5]),
        ("stage[12]_.*", [4, 5]),
        ("stem_conv|head", [3, 6]),
        ("student/(?:stem_conv|head)", [3, 6]),
        (("head", "bias"), [3, 4]),
        (".*", [0, 1, 2, 3, 4, 5, 6]),
        ("stage12/1", [2]),
        ("1", [2]),
        ("", []),
        ("Head", []),
        ((), []),
    ],
)
def test_patterns_match_whole_keys(patterns, selected):
    assert [i for i, path in enumerate(PATHS) if jt.tree.matches(path, patterns)] == selected


def test_mask():
    mask = jt.tree.mask(TREE, ("head", "stage12/0"))
    assert jax.tree.structure(mask) == jax.tree.structure(TREE)
    assert {p for p, taken in jt.tree.leaves_by_path(mask).items() if taken} == {"student/head/kernel", PATHS[1]}
    with pytest.raises(jt.InputError, match=r"'haed' selects no parameter; there are other/headless/kernel"):
        jt.tree.mask(TREE, ("head", "haed"))


def test_label_takes_the_first_pattern_and_must_cover():
    rules = {"student/head": "fast", "student": "slow", ".*": "still"}
    labels = jt.tree.leaves_by_path(jt.tree.label(TREE, rules))
    assert [labels[p] for p in PATHS] == ["still"] * 3 + ["fast"] + ["slow"] * 3
    reversed_labels = jt.tree.leaves_by_path(jt.tree.label(TREE, {"student": "slow", "head": "fast", ".*": "still"}))
    assert reversed_labels["student/head/kernel"] == "slow"
    with pytest.raises(jt.InputError, match=r"must cover every parameter.*other/stage12/0, other/stage12/1"):
        jt.tree.label(TREE, {"student": 1, "headless": 2})
    with pytest.raises(jt.InputError, match="'tail' selects no parameter"):
        jt.tree.label(TREE, {".*": 1, "tail": 2})


def test_no_regular_expression():
    with pytest.raises(jt.InputError, match=r"'stage\(' is no regular expression"):
        jt.tree.mask(TREE, "stage(")


def test_differences():
    ours = {"a": np.zeros(2), "b": np.zeros((2, 3)), "c": 1.0}
    theirs = {"b": np.zeros((3, 2)), "c": np.float32(2), "d": np.zeros(1)}
    found = jt.tree.differences(ours, theirs)
    assert found == (("a (2,)",), ("d (1,)",), ("b: expected (2, 3), got (3, 2)",))
    assert str(found) == "(- missing, + extra) - a (2,); + d (1,); b: expected (2, 3), got (3, 2)"
    assert not any(jt.tree.differences(ours, dict(reversed(ours.items()))))


def test_matched_pairs_by_path_not_by_order():
    ours = {"x": {"b": 1.0, "a": 2.0}, "new": 9.0}
    theirs = {"x": collections.OrderedDict(b=10.0, a=20.0), "old": 8.0}
    assert sorted(jt.tree.matched(ours, theirs, exclude=("new", "old"))) == [(1.0, 10.0), (2.0, 20.0)]
    with pytest.raises(jt.InputError, match=r"- new \(\); \+ old \(\)"):
        jt.tree.matched(ours, theirs)


def test_listed_counts_the_surplus():
    assert jt.tree.listed(["a", "b"]) == "a, b"
    assert jt.tree.listed(map(str, range(5)), "; ", limit=3) == "0; 1; 2; and 2 more"


def test_count():
    assert jt.tree.count({"a": jnp.zeros((2, 3)), "b": [np.zeros(4), 1.0]}) == 11
    assert jt.tree.count({}) == 0


def test_nested_is_the_inverse_of_paths():
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert jt.tree.nested(jt.tree.leaves_by_path(values)) == values
    assert jt.tree.nested({}) == {}
