"""The plan for a pod: what is read out of a compiled program's text, and how it is scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxtransfer as jt
from experiments.benchmarks import scaling

TEXT = """
  %ar = f32[128,4]{1,0} all-reduce(%x), replica_groups={}
  %two = (f32[8]{0}, bf16[2,2]{1,0}) all-reduce(%x, %y), replica_groups={}
  %ag = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[64]{0} all-gather-done(%ag)
  %rs = f32[16]{0} reduce-scatter(%x), dimensions={0}
  %other = f32[16]{0} fusion(%all-reduce.1), calls=%all-gather.clone
"""


def test_collectives_are_counted_by_the_bytes_of_their_results():
    sizes, counts = scaling.collectives(TEXT)
    assert sizes == {"all-reduce": 128 * 4 * 4 + 8 * 4 + 4 * 2, "all-gather": 64 * 4, "reduce-scatter": 16 * 4}
    assert counts == {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


def test_a_compiled_sum_over_devices_is_one(mesh_of):
    mesh = mesh_of(4)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    program = jax.jit(lambda x: jnp.sum(x, 0), in_shardings=rows, out_shardings=whole)
    sizes, counts = scaling.collectives(program.lower(np.zeros((8, 5), np.float32)).compile().as_text())
    assert (sizes, counts) == ({"all-reduce": 5 * 4}, {"all-reduce": 1})


def test_bytes_on_the_way_and_lines_through_measurements():
    assert scaling.sent("all-reduce", 100, 4) == 150
    assert scaling.sent("all-gather", 100, 4) == 75
    assert scaling.sent("reduce-scatter", 100, 4) == 300
    one, two = (scaling.Found(10 + n, 2 * n, n, n, 0, 5, {"all-reduce": 7 * n}, {"all-reduce": n}) for n in (1, 2))
    found = scaling.line_through(one, two, (1, 2), 24)
    assert found == scaling.Found(34, 48, 24, 24, 0, 5, {"all-reduce": 168}, {"all-reduce": 24})


@pytest.mark.slow
@pytest.mark.parametrize("plan", scaling.PLANS)
def test_every_plan_is_measured_in_its_tiny_form(plan):
    (told,) = scaling.main(scaling.Scaling(plans=(plan,), tiny=True))
    assert told["tflop_per_chip"] > 0
    assert told["argument_gb"] > 0
    assert 0 < told["utilisation"][0] <= told["utilisation"][1] <= 1
    assert ("all-gather" in told["collectives"]) or "fsdp" not in plan


def test_plans_and_devices_that_are_none_are_refused():
    with pytest.raises(jt.InputError, match="did you mean 'simclr'"):
        scaling.main(scaling.Scaling(plans=("simclrr",)))
    with pytest.raises(jt.InputError, match="2 virtual devices or more"):
        scaling.main(scaling.Scaling(devices=1))
