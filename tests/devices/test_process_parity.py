"""Two processes with two devices each, one with four and one with one train the same model, by each command."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import commands
from jobs import assert_alike, ended, start

NAMES = [*commands.ROWS, "two-tasks"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of the runs of one device, four, and two processes with two: all commands in one job each."""
    out = tmp_path_factory.mktemp("parity")
    several = {
        "one": lambda folder: start(commands.__file__, folder, "alone", *NAMES, count=1, devices=1),
        "four": lambda folder: start(commands.__file__, folder, "alone", *NAMES, count=1, devices=4),
        "two": lambda folder: start(commands.__file__, folder, *NAMES),
    }
    for name, job in several.items():
        codes, told = ended(job(out / name), timeout=1800)
        assert not any(codes), (name, told)
        assert not any(told[1:]), told  # the first one speaks
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_processes_and_devices_train_the_model_of_one(made, name, record_property):
    for other in ("four", "two"):
        # of episodes, how many make a batch depends on the devices, and by that which ones validate
        largest = assert_alike(made / "one" / name, made / other / name, scores=name != "maml")
        record_property(f"largest difference of {other}", largest)
        print(f"{name}: {other} differs from one by at most {largest:.1e}")
