import os
import subprocess
import sys
from pathlib import Path

import pytest
import quick_compilation

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The digits are prepared once per test run, outside of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTRANSFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def offline(monkeypatch):
    """No data set of the user's is seen."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture
def module():
    """Runs `python -m NAME ...` as a user does, on one device; returns exit code, stdout and stderr."""

    def go(name, *words):
        environment = {**os.environ, "XLA_FLAGS": quick_compilation.of_one_device()}
        command = [sys.executable, "-m", name, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return go
