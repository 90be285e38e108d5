"""`--shard` splits weights over the devices, tells who holds what, and refuses what can be no rule."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer import cli
from jaxtransfer.cli.shard_options import ShardOptions
from jaxtransfer.devices import fsdp
from jaxtransfer.runs import checkpoints

FEW = ("--steps", "4", "--eval-every", "2", "--batch-size", "16", "--optimizer", "sgd", "--lr", "0.02")
PRETRAIN = ("pretrain", "--data", "digits/upright", "--model", "mlp", *FEW)


def test_rules_are_read(mesh_of):
    rules = ("stage1/kernel=-,model", "stage2/bias=model,", "head=model", "a=b=whole", ".*=fsdp")
    placed = ShardOptions(shard=rules, mesh=("data=4", "model=2")).placed("jit")
    assert dict(placed["mesh"].shape) == {"data": 4, "model": 2}
    assert placed["shard"] == {
        "stage1/kernel": (None, "model"),
        "stage2/bias": ("model",),
        "head": "model",
        "a=b": None,
        ".*": fsdp("data"),
    }
    placed = ShardOptions(shard=("fsdp",)).placed("jit")
    assert (dict(placed["mesh"].shape), placed["shard"]) == ({"data": 8}, {".*": fsdp("data")})
    assert "shard" not in ShardOptions().placed("jit")
    assert ShardOptions().placed("pmap") == {"mesh": None, "mode": "pmap"}


@pytest.mark.parametrize(
    ("shard", "mesh", "mode", "line"),
    [
        (("fsdpp",), (), "jit", "--shard takes fsdp; or PATTERN=RULE.*got 'fsdpp'"),
        (("=fsdp",), (), "jit", "--shard takes fsdp"),
        (("kernel=",), (), "jit", "--shard takes fsdp"),
        (("a=fsdp", "a=whole"), (), "jit", "'a' is there twice"),
        (("fsdp",), ("data=4",), "jit", "--mesh must name all 8 devices, the product of its sizes; got data=4"),
        (("fsdp",), ("data=4", "data=2"), "jit", "each axis once, data=4 model=2 say; got 'data=2'"),
        (("fsdp",), ("data:4",), "jit", "--mesh takes AXIS=SIZE"),
        (("fsdp",), ("whole=8",), "jit", "--mesh takes AXIS=SIZE"),
        ((), ("data=8",), "jit", "--mesh names the axes that --shard splits over"),
        ((".*=rows",), (), "jit", "--shard .*=...: 'rows' is no axis of --mesh, which has data; a rule is fsdp, whole"),
        (("kernel=-,modle",), ("data=4", "model=2"), "jit", "'modle' is no axis of --mesh, which has data, model"),
        (("kernel=data,data",), (), "jit", "the axis 'data' splits one dimension of a weight, not two"),
        (("fsdp",), (), "pmap", "leave --mode pmap out"),
    ],
)
def test_what_is_no_rule_is_refused(shard, mesh, mode, line):
    with pytest.raises(jt.InputError, match=line):
        ShardOptions(shard=shard, mesh=mesh).check_shard(mode)


def test_a_dry_run_tells_who_holds_what(tmp_path, capsys):
    assert cli.main([*PRETRAIN, "--out", str(tmp_path / "run"), "--dry-run", "--shard", "fsdp"]) == 0
    told, table = capsys.readouterr()
    lines = [line.split() for line in table.splitlines()]
    assert ["model/stage1/kernel", "float32[64,", "256]", "-,", "data", "8,192", "65,536"] in lines
    assert ["model/head/kernel", "float32[256,", "10]", "data,", "-", "1,280", "10,240"] in lines
    assert ["model/head/bias", "float32[10]", "whole", "40", "40"] in lines
    (argument,) = re.findall(r"\| arguments[^|]*\| ([\d.,]+)", told)
    assert float(argument) == pytest.approx(85_002 * 4 / 8 / 2**20, abs=0.06)  # MiB, with a bit of the whole ones


def test_rules_that_do_not_fit_the_weights_are_refused_in_the_words_of_the_command(refused, tmp_path):
    for rules, line in (
        (("haed=fsdp", ".*=whole"), "--shard: the pattern 'haed' selects no parameter; there are model/head/bias, "),
        (("head=fsdp",), "but leave out 'model/stage1/bias'; add a last one for the rest, '.*=whole' say"),
        (
            (".*=data",),
            "nothing divides by the 8 devices of axis 'data'; give it PATTERN=whole before, or fsdp,",
        ),
        (("bias=-,data", ".*=fsdp"), "has shape (10,), and the rule an entry for each of 2 dimensions"),
        (("head/kernel=-,data", ".*=fsdp"), "of which 10 doesn't divide by the 8 devices of 'data'; split another"),
    ):
        said = refused(*PRETRAIN, "--out", tmp_path / "run", "--shard", *rules)
        assert line in said
        assert "--shard: " in said
        assert not re.search(r"None|jt\.|(?<!--)shard:", said)


@pytest.mark.slow
def test_processes_that_share_the_weights_train_the_model_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(jt.__file__).parents[1]), "XLA_FLAGS": ""}
    launch = ("launch", "--processes", "2", "--devices", "2", "--")
    for name, before, after in (("one", (), ()), ("two", launch, ("--shard", "fsdp"))):
        words = (*before, *PRETRAIN, "--out", str(tmp_path / name), *after)
        done = subprocess.run(
            [sys.executable, "-m", "jaxtransfer", *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert len(re.findall(r"model/stage1/kernel +float32\[64, 256\] +-, data +16,384 +65,536", done.stderr)) == 1
    one, two = (checkpoints.read(tmp_path / name / "checkpoints").leaves for name in ("one", "two"))
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, rtol=0, atol=1e-5, err_msg=path)
    assert "--shard" in (tmp_path / "two" / "config.json").read_text()
    assert (tmp_path / "two" / "report.md").exists()
