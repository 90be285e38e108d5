import numpy as np
import pytest

from jaxtransfer.data import pipeline, prefetch_to_device
from jaxtransfer.errors import InputError


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_order_is_kept_and_size_is_ahead(size):
    put = []
    batches = prefetch_to_device(iter(range(10)), lambda i: put.append(i) or i * i, size=size)
    assert put == []
    assert next(batches) == 0
    assert put == list(range(min(size, 10)))
    assert list(batches) == [i * i for i in range(1, 10)]


def test_an_error_comes_after_the_batches_before_it():
    def source():
        yield from range(3)
        raise OSError("disk gone")

    batches = prefetch_to_device(source(), lambda i: i, size=3)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    with pytest.raises(ZeroDivisionError):
        list(prefetch_to_device([0], lambda i: 1 / i))


def test_puts_batches_of_a_pipeline_on_the_device_and_closes_it(numbered):
    import jax

    stream = pipeline(numbered(20), 8)
    source = stream.iterate()
    batches = prefetch_to_device(source, jax.device_put)
    for i in range(5):
        batch = next(batches)
        assert isinstance(batch["image"], jax.Array)
        np.testing.assert_array_equal(batch["image"], stream.batch(i)["image"])
    batches.close()
    assert list(source) == []


def test_size_below_one():
    with pytest.raises(InputError, match="at least 1"):
        prefetch_to_device([], lambda batch: batch, size=0)
