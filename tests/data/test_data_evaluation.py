import numpy as np
import pytest

from jaxtransfer.data import augment, eval_batches
from jaxtransfer.errors import InputError


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 3, 8, 10, 24])
def test_every_example_counts_once(numbered, numbers, n, hosts):
    dataset = numbered(n)
    parts = [eval_batches(dataset, 8, shard=(index, hosts)) for index in range(hosts)]
    assert {len(part) for part in parts} == {-(-n // 8)}
    seen, total = [], 0
    for batches in zip(*parts, strict=True):
        for batch in batches:
            assert batch["image"].shape == (8 // hosts, 6, 5, 3)
            assert batch["image"].dtype == np.uint8
            assert batch["mask"].dtype == np.float32
            assert batch["label"].dtype == np.int32
            real = batch["mask"] == 1
            assert not batch["image"][~real].any()
            seen += numbers(batch)[real].tolist()
            np.testing.assert_array_equal(batch["label"][real], dataset.labels[numbers(batch)[real]])
            total += batch["mask"].sum()
    assert seen == list(range(n))
    assert total == n


def test_iterates_again_and_normalises(numbered):
    plain, scaled = (eval_batches(numbered(10), 4, augment=t) for t in (None, augment.normalize(0, 1)))
    first, second = list(scaled), list(scaled)
    assert len(first) == len(second) == len(scaled) == 3
    for batch, again, raw in zip(first, second, plain, strict=True):
        np.testing.assert_array_equal(batch["image"], again["image"])
        np.testing.assert_allclose(batch["image"], raw["image"] / 255, rtol=1e-6)
        np.testing.assert_array_equal(batch["mask"], raw["mask"])


def test_unusable_options(numbered):
    for dataset, options in [
        (numbered(10).take(0), {"batch_size": 4}),
        (numbered(10), {"batch_size": 0}),
        (numbered(10), {"batch_size": 5, "shard": (0, 2)}),
        (numbered(10), {"batch_size": 5, "cache": "device"}),
        (numbered(10), {"batch_size": 5, "prefetch": 0}),
    ]:
        with pytest.raises(InputError):
            eval_batches(dataset, **options)
