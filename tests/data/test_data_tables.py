"""Tables: what becomes of their columns, what is missing, and which rows the statistics are of."""

import gzip
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtransfer.data import Dataset, Vocabulary, fingerprint, from_frame, load
from jaxtransfer.errors import InputError
from jaxtransfer.texts.words import words_of

pandas = pytest.importorskip("pandas")

LINES = """place,age,sex,size,ill,note,score
north,30,f,,yes,Fine. It's fine!,0.5
north,40,m,2.5,no,no pain,1.5
north,,m,1.5,yes,"pain, pain",2.5
north,50,f,3.5,no,NA,3.5
south,60,x,,no,new words here,4.5
south,,,9.5,yes,fine,5.5
"""
OPTIONS = {"split_by": "place", "train": "north", "label": "ill", "tokens": "note", "columns": ("score",)}


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text(LINES)
    return path


def table(path, split, **options):
    return load(f"table:{path}", split, **{**OPTIONS, **options})


def test_columns_by_hand(csv):
    """Everything is of the training rows: ages 30, 40, 50; sizes 2.5, 1.5, 3.5; sexes f and m."""
    train, test = table(csv, "north"), table(csv, "south")
    names = ("age", "size", "age is missing", "size is missing", "sex=f", "sex=m")
    assert train.entries["features"].names == test.entries["features"].names == names
    age, size = np.sqrt(200 / 3), np.sqrt(2 / 3)  # the standard deviations
    expected = [
        [-10 / age, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
        [0, -1 / size, 1, 0, 0, 1],
        [10 / age, 1 / size, 0, 0, 1, 0],
    ]
    np.testing.assert_allclose(train.column("features"), expected, rtol=1e-6, atol=1e-7)
    expected = [[20 / age, 0, 0, 1, 0, 0], [0, 7 / size, 1, 0, 0, 0]]
    np.testing.assert_allclose(test.column("features"), expected, rtol=1e-6, atol=1e-7)
    assert train.class_names == test.class_names == ("no", "yes")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 1, 0], [0, 1])
    np.testing.assert_array_equal(test.column("score"), np.array([4.5, 5.5], np.float32))
    assert train.entries["score"].classes is None
    assert not np.isnan(train.column("features")).any()


def test_tokens_are_the_words_of_the_training_rows(csv):
    train, test = table(csv, "north"), table(csv, "south")
    names = train.entries["tokens"].class_names
    assert names == ("<padding>", "<unknown>", "pain", "fine", "!", ",", ".", "it's", "na", "no")
    spelled = [[names[token] for token in row if token] for row in train.column("tokens")]
    assert spelled == [["fine", ".", "it's", "fine", "!"], ["no", "pain"], ["pain", ",", "pain"], ["na"]]
    assert test.column("tokens").tolist() == [[1, 1, 1, 0, 0], [3, 0, 0, 0, 0]]
    np.testing.assert_array_equal(test.column("tokens_mask"), test.column("tokens") > 0)
    short = table(csv, "north", length=2, words=3)
    assert short.column("tokens").tolist() == [[3, 1], [1, 2], [2, 1], [1, 0]]
    assert short.entries["tokens"].classes == 5


def test_the_columns_that_became_features_are_shown(csv, caplog):
    with caplog.at_level(logging.INFO, "jaxtransfer"):
        train = table(csv, "north")
    assert "features are made of age, size, sex; others by drop= or features=" in caplog.text
    assert repr(train).endswith("; features are made of age, size, sex)")
    assert "made of age)" in repr(table(csv, "north", features=("age",)))
    wide = from_frame({f"column{k}": [0.0, 1.0] for k in range(14)})
    assert repr(wide).endswith("column10, column11 and 2 more)")


def test_what_is_missing_is_said(csv, caplog):
    with caplog.at_level(logging.WARNING, "jaxtransfer"):
        table(csv, "north", length=3)
    said = caplog.text
    assert "of 4 rows numbers are missing, age in 1, size in 1: the mean of the training rows stands for them" in said
    assert "features of their own tell where\n" in said
    assert "1 of 4 texts are cut to 3 tokens" in said
    caplog.clear()
    csv.write_text(LINES.replace("north,,m", "north,45,m").replace("north,30,f,,", "north,30,f,2.5,"))
    with caplog.at_level(logging.WARNING, "jaxtransfer"):
        test = table(csv, "south")
    assert "but not of age, size, which no training row lacks" in caplog.text
    assert "categories that no training row has (sex=(missing)) are none of the features" in caplog.text
    assert test.entries["features"].names == ("age", "size", "sex=f", "sex=m")
    caplog.clear()
    csv.write_text(LINES.replace("north,40,m,2.5", "north,40,m,").replace(",1.5,yes", ",,yes"))
    with caplog.at_level(logging.WARNING, "jaxtransfer"):
        left = table(csv, "north", drop=("sex",))
    assert "the training rows have at most one value of size: left out" in caplog.text
    assert left.entries["features"].names == ("age", "age is missing", "size is missing")


def test_no_value_of_another_row_counts(csv):
    """Any change of the rows that training isn't on leaves the training data as they are, bit for bit."""
    before = {name: table(csv, "north").column(name) for name in table(csv, "north").entries}
    csv.write_text(LINES.replace("60,x", "-900,q").replace(",9.5", ",1e6").replace("new words", "age old"))
    after = table(csv, "north")
    for name, values in before.items():
        np.testing.assert_array_equal(after.column(name), values)
    assert table(csv, "south").column("features")[0, 0] < -100


def test_frames_alike_and_rows_to_predict(csv):
    frame = pandas.read_csv(csv)
    north, south = (frame[frame.place == place] for place in ("north", "south"))
    train = from_frame(north, label="ill", tokens="note", columns=("score",), drop=("place",))
    test = from_frame(south, like=train)
    loaded = table(csv, "south", tokens="note")
    for name in ("features", "label", "tokens", "tokens_mask", "score"):
        np.testing.assert_array_equal(test.column(name), loaded.column(name))
    rows = from_frame(south.drop(columns="ill"), like=train.subset(per_class=1))
    assert "label" not in rows.entries
    np.testing.assert_array_equal(rows.column("features"), test.column("features"))
    with pytest.raises(InputError, match=r"the rows lack the column 'age', of which 'features' is made"):
        from_frame(south.drop(columns="age"), like=train)
    with pytest.raises(InputError, match="'maybe' is no class of 'ill'; known: no, yes"):
        from_frame(south.assign(ill="maybe"), like=train)
    with pytest.raises(InputError, match="column 'age' must be numbers"):
        from_frame(south.assign(age="old"), like=train)
    for like in (train.labels, Dataset.from_columns(label=[0, 1])):
        with pytest.raises(InputError, match="like= is a data set that from_frame"):
            from_frame(south, like=like)
    with pytest.raises(InputError, match="with like= the columns are those"):
        from_frame(south, like=train, drop=("age",))


def test_labels_of_every_kind():
    columns = {
        "x": [1.0, 2.0, 4.0],
        "whole": [7, 3, 7],
        "text": ["b", "a", "b"],
        "true": [True, False, True],
        "real": [0.5, 1.0, 2.0],
        "coded": [10.0, 9.0, 10.0],
        "kind": pandas.Categorical(["u", "v", "u"]),
    }
    names = tuple(columns)[1:]
    data = from_frame(columns, label=names, categorical=("coded",))
    assert {name: data.entries[name].class_names for name in names} == {
        "whole": ("3", "7"),
        "text": ("a", "b"),
        "true": ("False", "True"),
        "real": None,
        "coded": ("9", "10"),
        "kind": ("u", "v"),
    }
    for name in ("whole", "text", "true", "coded"):
        assert data.column(name).tolist() == [1, 0, 1]
    numbers = from_frame(columns, label={"label": "whole"}, numeric=("whole",), features=("x", "true"))
    assert (numbers.labels.tolist(), numbers.labels.dtype) == ([7, 3, 7], np.float32)
    assert numbers.entries["features"].names == ("x", "true")
    nullable = pandas.DataFrame({"x": pandas.array([1, None, 3], "Int64"), "y": [0, 1, 0]})
    assert from_frame(nullable, label="y").column("features").tolist() == [[-1, 0], [0, 1], [1, 0]]


REFUSED = [
    ({"label": "y", "drop": ("when", "inf")}, r"1 of 3 rows have no 'y'; leave them out: .*dropna\(subset=\['y'\]\)"),
    ({"label": "z"}, r"unknown column of frame \(all\) 'z'"),
    ({"drop": ("when", "inf"), "fill": False}, "1 of 3 rows have no 'y'; mend the table, or leave"),
    ({"features": ("when",)}, r"'when' has points in time; .*drop=\('when',\)"),
    ({"drop": "when"}, r"drop= is a tuple of names, \('when',\) of one"),
    ({"columns": {"mask": "x"}}, "can't be called 'mask'"),
    ({"columns": {"features": "x"}}, "can't be called 'features'"),
    ({"tokens": "text", "columns": {"tokens_mask": "x"}}, "can't be called 'tokens_mask'"),
    ({"features": ("inf",)}, "'inf' has infinite numbers"),
    ({"drop": ("x", "y", "text", "when", "inf")}, "nothing is left of its columns"),
    ({"label": "x", "features": ("y", "x")}, "features= has 'x', which is a label"),
    ({"label": 4}, "label= takes a name, names"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_unusable_tables_are_told(asked, message):
    columns = {"x": [1, 2, 3], "y": [0.5, None, 1], "text": ["a", "b", "c"], "inf": [1.0, np.inf, 2.0]}
    columns["when"] = pandas.to_datetime(["2020-01-01"] * 3)
    with pytest.raises(InputError, match=message):
        from_frame(columns, **asked)


def test_many_texts_are_no_categories():
    names = [f"name {i}" for i in range(101)]
    with pytest.raises(InputError, match=r"'name' has 101 different texts .*drop=\('name',\), .*tokens='name'"):
        from_frame({"name": names, "y": range(101)}, label="y")
    assert from_frame({"name": names[:100], "y": range(100)}, label="y").column("features").shape == (100, 100)


def test_splits_of_a_table(tmp_path, csv):
    path = tmp_path / "rows.csv"
    pandas.DataFrame({"x": np.arange(50) // 2, "y": np.arange(50) // 2 % 2}).to_csv(path, index=False)
    parts = {split: load(f"table:{path}", split, columns="x", label="y") for split in ("train", "test", "all")}
    x = {split: set(part.column("x").tolist()) for split, part in parts.items()}
    assert len(parts["test"]) == 10  # a fifth of the 25 kinds of rows, both of each
    assert not x["train"] & x["test"]
    assert x["train"] | x["test"] == x["all"]
    shuffled = pandas.read_csv(path).sample(frac=1, random_state=0)
    shuffled.to_csv(tmp_path / "shuffled.csv", index=False)
    again = load(f"table:{tmp_path}/shuffled.csv", "test", columns="x", label="y")
    assert set(again.column("x").tolist()) == x["test"]
    whole = table(csv, "all")
    np.testing.assert_array_equal(table(csv, "north+south").column("features"), whole.column("features"))
    np.testing.assert_array_equal(table(csv, "south[1:]+north[:50%]").column("score"), np.float32([5.5, 0.5, 1.5]))
    for split, train, message in (
        ("west", "north", r"unknown split of .* 'west'; known: all, north, south"),
        ("north", None, r"has no split 'train'; its splits: all, north, south; name .*train='north'"),
        ("north", "nort", "has no split 'nort'"),
        ("north[:0]", "north", "has no rows"),
    ):
        with pytest.raises(InputError, match=message):
            table(csv, split, train=train)


def test_files_of_every_kind_hold_the_same(tmp_path, csv):
    frame = pandas.read_csv(csv)
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "t.tsv").write_text(LINES.replace('"pain, pain"', "pain; pain").replace(",", "\t").replace(";", ","))
    expected = table(csv, "south", drop=("note",), tokens=())
    for name in ("t.parquet", "t.jsonl", "t.csv.gz", "t.tsv"):
        other = table(tmp_path / name, "south", drop=("note",), tokens=())
        assert fingerprint(other)["arrays"] == fingerprint(expected)["arrays"], name
    (tmp_path / "t.txt").write_text("one two\ntwo three\n\n")
    texts = load(f"table:{tmp_path}/t.txt", "all", tokens="text", train="all")
    assert texts.column("tokens").tolist() == [[3, 2], [2, 4], [0, 0]]


def test_a_fingerprint_does_not_say_where_a_table_lies(tmp_path, csv):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "copy.csv").write_text(LINES)
    here, there = table(csv, "north"), table(tmp_path / "else" / "copy.csv", "north")
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint(here.select([2, 0])) == fingerprint(there.select([2, 0]).decoded())
    (tmp_path / "else" / "copy.csv").write_text(LINES.replace("40,m", "41,m"))
    changed = fingerprint(table(tmp_path / "else" / "copy.csv", "north"))
    assert {key for key, value in fingerprint(here).items() if changed[key] != value} == {"arrays"}


def test_quotes_in_a_tsv_are_signs(tmp_path):
    (tmp_path / "t.tsv").write_text('label\ttext\n0\t"open\n1\tshut"\n1\tnull\n')
    data = load(f"table:{tmp_path}/t.tsv", "all", label="label", tokens="text", train="all")
    assert len(data) == 3
    assert [data.entries["tokens"].class_names[k] for k in data.column("tokens")[2] if k] == ["null"]


def test_files_that_are_no_tables(tmp_path, csv):
    (tmp_path / "broken.parquet").write_bytes(b"no")
    (tmp_path / "empty.csv").write_text("")
    for name, message in (
        ("none.csv", "there is no file"),
        ("t.xlsx", "cannot tell what table"),
        ("broken.parquet", "cannot read the table"),
        ("empty.csv", "cannot read the table"),
    ):
        with pytest.raises(InputError, match=message):
            load(f"table:{tmp_path}/{name}", "train")
    with pytest.raises(InputError, match=r"unknown argument for tables 'labels' \(did you mean 'label'\?\)"):
        load(f"table:{csv}", "train", labels="ill")
    with pytest.raises(InputError, match="a table has no images"):
        load(f"table:{csv}", "train", image="x")
    with pytest.raises(InputError, match="drop= is of tables"):
        load("digits/upright", "train", drop=("row",))


@pytest.mark.slow
def test_without_pandas_one_line_says_what_to_install(csv):
    script = "import sys; sys.modules['pandas'] = None\nimport jaxtransfer as jt\n"
    script += f"try:\n jt.data.load('table:{csv}', 'all')\nexcept jt.InputError as error:\n print(error)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "tables are read by pandas: pip install 'jaxtransfer[tables]'\n"


def test_a_vocabulary_is_a_function_of_its_texts():
    texts = ["Ein Maß, two  words", "two WORDS don’t", ""]
    assert words_of(texts[0]) == ["ein", "mass", ",", "two", "words"]
    vocabulary = Vocabulary.of(texts)
    assert vocabulary.words == ("two", "words", ",", "don’t", "ein", "mass")
    assert (len(vocabulary), vocabulary.length) == (8, 5)
    assert Vocabulary.of(reversed(texts)) == vocabulary
    assert Vocabulary.of(texts, min_count=2, length=3)(["three words, two"]).tolist() == [[1, 3, 1]]
    assert Vocabulary.of(texts, size=1).words == ("two",)
    assert vocabulary([]).shape == (0, 5)
    for bad, message in (("text", "several texts, got one"), ([None], "text 0 is None"), ([""], "have no words")):
        with pytest.raises(InputError, match=message):
            Vocabulary.of(bad)
    for options in ({"size": 0}, {"min_count": 0}, {"length": -1}):
        with pytest.raises(InputError, match=r"needs|at least"):
            Vocabulary.of(texts, **options)


def test_numbers_that_float32_cannot_hold_are_told():
    train = from_frame({"a": [1.0, 2.0], "y": [0.5, 1.5]}, label="y")
    with pytest.raises(InputError, match=r"rows \(all\): row 1 has in 'a' a number that float32 can't hold"):
        from_frame({"a": [1.0, 1e300]}, like=train, name="rows")
    with pytest.raises(InputError, match="row 0 has in 'y' a number that float32 can't hold, 1e\\+300"):
        from_frame({"a": [1.0, 2.0], "y": [1e300, 1.5]}, label="y")
    for far in ([0.0, 1e308, -1e308], [0.0, 1e-320, 0.0]):
        with pytest.raises(InputError, match=r"column 'a', .* no standard deviation"):
            from_frame({"a": far})


def test_a_class_that_is_called_nan_has_its_place():
    orders = [["nan", "10", "2", "b"], ["10", "nan", "b", "2"], ["b", "2", "nan", "10"]]
    found = {from_frame({"a": [1, 2, 3, 4], "y": names}, label="y").class_names for names in orders}
    assert found == {("2", "10", "b", "nan")}


def test_what_a_recipe_says_is_not_said_otherwise():
    train = from_frame({"a": [1.0, 2.0], "t": ["x y", "z"]}, tokens="t")
    for more in ({"fill": False}, {"words": 3}, {"length": 1}, {"drop": ("a",)}):
        with pytest.raises(InputError, match="with like= the columns are those of that data set"):
            from_frame({"a": [1.0], "t": ["x"]}, like=train, **more)
    with pytest.raises(InputError, match="length=0"):
        from_frame({"t": ["x y"]}, tokens="t", length=0)
    with pytest.raises(InputError, match="features= has 'a' more than once"):
        from_frame({"a": [1.0, None]}, features=("a", "a"))


def test_labels_are_classes_though_rows_of_another_split_lack_them(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("split,a,y\ntrain,1,7\ntrain,2,3\ntest,3,\n")
    train = load(f"table:{path}", "train", label="y")
    assert (train.class_names, train.labels.tolist()) == (("3", "7"), [1, 0])
    assert load(f"table:{path}", "train", label="y", numeric=("y",)).labels.tolist() == [7, 3]
    with pytest.raises(InputError, match="1 of 1 rows have no 'y'"):
        load(f"table:{path}", "test", label="y")


def test_lines_of_more_fields_than_names_move_no_column(tmp_path):
    path = tmp_path / "t.csv"
    for lines in ("a,b\n1,2,3\n4,5,6\n", "a,b\n1,2,3\n4,5\n", "a,b\n1,2\n4,5,6\n"):
        path.write_text(lines)
        with pytest.raises(InputError, match="cannot read the table"):
            load(f"table:{path}", "all")
