"""A run on a table keeps how its columns were made, and makes those of new rows alike in another process."""

import json
import subprocess
import sys

import numpy as np
import optax
import pytest

import jaxtransfer as jt

pandas = pytest.importorskip("pandas")

ROWS = """age,income,sex,note,rank,label
31,0.1,f,fine and good,0.5,yes
45,1e7,m,bad,1.5,no
,3.3333333333333335,f,good,2.5,yes
52,7.7,,bad and dull,3.5,no
"""
NEW = """age,income,sex,note,rank
47.3,,m,good and new,9
,12345.678,q,,1
"""
HOW = {"label": "label", "tokens": "note", "columns": ("rank",)}
IN_ANOTHER = """
import sys, numpy as np, jaxtransfer as jt
run = jt.load_run(sys.argv[1])
found = jt.data.load(f"table:{sys.argv[2]}", "all", like=run)
np.savez(sys.argv[3], **{name: found.column(name) for name in found.entries})
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a tiny network, a step long, the table that it learned from, and new rows."""
    folder = tmp_path_factory.mktemp("tables")
    for name, rows in {"old": ROWS, "new": NEW}.items():
        (folder / f"{name}.csv").write_text(rows)
    train = jt.data.load(f"table:{folder / 'old.csv'}", "all", train="all", **HOW)
    model, out = jt.models.mlp(train.classes, hidden=(4,)), folder / "run"
    objective = jt.classification(model, view="features")
    jt.fit(objective, optax.adam(1e-2), jt.data.pipeline(train, 4), steps=1, out=out, model=model)
    return out, train, folder / "new.csv"


@pytest.mark.slow
def test_a_run_makes_the_columns_of_new_rows_in_another_process(trained, tmp_path):
    out, train, new = trained
    expected = jt.data.from_frame(pandas.read_csv(new), like=train)
    subprocess.run([sys.executable, "-c", IN_ANOTHER, str(out), str(new), str(tmp_path / "found.npz")], check=True)
    found = np.load(tmp_path / "found.npz")
    assert set(found) == set(expected.entries) == {"features", "rank", "tokens", "tokens_mask"}
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected.column(name), strict=True)
    run = jt.load_run(out)
    again = jt.data.from_frame(pandas.read_csv(new).assign(label="yes"), like=run)
    assert again.recipe == train.recipe
    assert again.class_names == run.class_names == ("no", "yes")
    assert again.labels.tolist() == [1, 1]
    outputs, _ = run.model.apply(run.variables, again.column("features"), train=False, key=None)
    assert outputs["logits"].shape == (2, 2)


def test_what_says_nothing_of_a_table_is_refused(trained, tmp_path):
    out, _, new = trained
    run, frame = jt.load_run(out), pandas.read_csv(new)
    other = jt.data.Dataset.from_columns(features=np.zeros((2, 3), np.float32))
    for like in (other, run.model, 3):
        with pytest.raises(jt.InputError, match="says nothing of a table"):
            jt.data.from_frame(frame, like=like)
        with pytest.raises(jt.InputError, match="says nothing of a table"):
            jt.data.load(f"table:{new}", "all", like=like)
    for asked in ({"drop": ("age",)}, {"label": "sex"}, {"train": "all"}, {"words": 3}):
        with pytest.raises(jt.InputError, match="with like= the columns are those of that data set or run"):
            jt.data.load(f"table:{new}", "all", like=run, **asked)
    with pytest.raises(jt.InputError, match="like= is of a table"):
        jt.data.load("digits/upright", "train", like=run)
    with pytest.raises(jt.InputError, match="the rows lack the column 'income', of which 'features' is made"):
        jt.data.from_frame(frame.drop(columns="income"), like=run)
    (tmp_path / "checkpoints").symlink_to(out / "checkpoints")
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    with pytest.raises(jt.InputError, match="cannot read what the columns of this run are made by"):
        jt.data.from_frame(frame, like=jt.load_run(tmp_path))
    kept = json.loads((out / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps({**kept, "gaps": []}))
    with pytest.raises(jt.InputError, match="is not of the table that the run was trained on"):
        jt.data.from_frame(frame, like=jt.load_run(tmp_path))


@pytest.mark.slow
def test_a_run_of_before_tables_were_kept_trains_on(trained, tmp_path):
    _, train, _ = trained
    objective = jt.classification(jt.models.mlp(train.classes, hidden=(4,)), view="features")
    how = {"out": tmp_path / "run", "model": objective.models[0], "dataset": train}
    jt.fit(objective, optax.adam(1e-2), jt.data.pipeline(train, 4), steps=1, **how)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["table"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "table.json").unlink()
    assert jt.load_run(tmp_path / "run").table is None
    jt.fit(objective, optax.adam(1e-2), jt.data.pipeline(train, 4), steps=2, **how)
    assert jt.load_run(tmp_path / "run").table == train.recipe.as_entries()
