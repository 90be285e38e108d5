"""Strict settings for every test: eight virtual devices, no rank promotion, no captured constants.

Compiled programs are kept between runs, shared by workers and the processes that tests start: see `compile_cache.py`.
`--unoptimised` compiles them without optimisation, and leaves out the tests that need it: see `quick_compilation.py`.
"""

import gc
import os
import signal

import compile_cache
import quick_compilation

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = quick_compilation.with_flags("--xla_force_host_platform_device_count=8")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.update(compile_cache.variables(os.environ))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no lines of ours in programs: lowering is quicker

import jax
import numpy as np
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; tests send it to themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_captured_constants_warn_bytes", 1_000_000)  # a warning, and warnings are errors


def pytest_addoption(parser):
    parser.addoption(
        "--unoptimised", action="store_true", help="compile without optimisation; leave out tests marked optimised"
    )


def pytest_configure(config):
    if config.getoption("unoptimised"):
        quick_compilation.turn_on()


def pytest_collection_modifyitems(config, items):
    if config.getoption("unoptimised"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("optimised")])
        items[:] = [item for item in items if not item.get_closest_marker("optimised")]


def pytest_collection_finish(session):
    """Collects garbage seldom: each look at all of JAX's objects takes a tenth of the time, and finds next to none."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_sessionfinish(session):
    """Bounds the cache, once for all workers."""
    if not hasattr(session.config, "workerinput"):
        compile_cache.prune()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def undrawn(monkeypatch):
    """Learning curves are one pixel, as drawing takes as long as a test's own run."""

    def stand_in(curves, path):
        import cv2

        assert curves
        path.exists() or path.write_bytes(cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes())

    monkeypatch.setattr("jaxtransfer.runs.report.plot_curves", stand_in)


@pytest.fixture
def x64():
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh_of():
    """Makes a mesh as a user does: `mesh_of(4)` or, with two axes, `mesh_of(2, 2)`."""

    def make(*shape):
        names = ("data", "model")[: len(shape)]
        return jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])

    return make
