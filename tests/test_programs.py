"""Compiled programs on disk: read again by a second process, bounded, mended; only commands keep them."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from jaxtransfer import cli
from jaxtransfer.devices import programs
from jaxtransfer.devices.programs import programs_kept, prune

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)

COMPILE = """
import json, runpy, sys
from pathlib import Path
import jax, jax.monitoring
import jax.numpy as jnp

programs_kept = runpy.run_path(sys.argv[1])["programs_kept"]  # without the package, which takes long to import
told = []
jax.monitoring.register_event_listener(lambda name, **_: told.append(name.rpartition("/")[2]))
with programs_kept(Path(sys.argv[2])):
    value = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(9.0).reshape(3, 3))
counts = {"asked": told.count("compile_requests_use_cache"), "hits": told.count("cache_hits")}
print(json.dumps({**counts, "value": value.tolist()}))
"""


def directory():
    return settings()["jax_compilation_cache_dir"]


def settings():
    return {name: getattr(jax.config, name) for name in NAMES}


@pytest.fixture
def unset():
    """JAX keeps nothing meanwhile, as in a user's process; the tests' own cache is back afterwards."""
    before = settings()["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def compiled_in(folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    words = [sys.executable, "-c", COMPILE, programs.__file__, folder]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder of programs, and what the process that filled it told."""
    folder = tmp_path_factory.mktemp("programs")
    return folder, compiled_in(folder)[0]


def test_a_second_process_compiles_nothing(first):
    folder, told = first
    again, _ = compiled_in(folder)
    assert told["asked"] > 0
    assert told["hits"] == 0
    assert again["hits"] == again["asked"] == told["asked"]
    assert again["value"] == told["value"]


@pytest.mark.slow
def test_a_half_written_program_is_compiled_again_and_replaced_in_silence(first):
    folder, told = first
    entries = sorted(folder.glob("*/*-cache"))
    whole = [entry.read_bytes() for entry in entries]
    entries[0].write_bytes(whole[0][: len(whole[0]) // 2])
    mended, stderr = compiled_in(folder)
    assert mended["hits"] == told["asked"] - 1
    assert mended["value"] == told["value"]
    assert "Error reading" not in stderr
    assert not entries[0].exists()
    assert [entry.read_bytes() for entry in entries[1:]] == whole[1:]
    assert compiled_in(folder)[0]["hits"] == told["asked"] - 1
    assert [entry.exists() for entry in entries] == [True] * len(entries)  # written again


def test_jax_is_set_as_it_was(tmp_path, unset):
    before = settings()
    with programs_kept(tmp_path) as folder:
        assert folder is not None
        assert folder.parent == tmp_path
        assert settings() == dict(zip(NAMES, (str(folder), 0.0, -1), strict=True))
    assert settings() == before
    with pytest.raises(KeyboardInterrupt), programs_kept(tmp_path):
        raise KeyboardInterrupt
    assert settings() == before


def test_a_folder_that_jax_has_already_stays(tmp_path, unset):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with programs_kept(tmp_path / "ours") as folder:
        assert folder is None
        assert directory() == str(tmp_path / "own")
    assert not (tmp_path / "ours").exists()


def test_a_cache_that_is_turned_off_stays_off(tmp_path, unset):
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with programs_kept(tmp_path / "ours") as folder:
            assert folder is None
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    assert not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path, unset):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="compiled programs are not kept"), programs_kept(tmp_path / "file") as folder:
        assert folder is None


def test_other_warnings_are_shown_as_before(tmp_path, unset, monkeypatch):
    seen = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest, **more: seen.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with programs_kept(tmp_path):
            warnings.warn("Error reading persistent compilation cache entry for 'x'", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert seen == ["another"]


def test_what_was_used_longest_ago_goes(tmp_path):
    for number, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 + number, 1000 + number))
    os.utime(tmp_path / "a", (5000, 1000))  # read lately
    prune(tmp_path, 200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
    prune(tmp_path / "nowhere")


def command(monkeypatch, tmp_path, words, **environment):
    """Returns the folder of programs that JAX had while a command ran."""
    seen = []
    monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path / "cache"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for kind in (cli.Evaluate, cli.Models):
        monkeypatch.setattr(kind, "run", lambda self: seen.append(directory()))
    assert cli.main(words) == 0
    return seen[0]


EVALUATE = ["evaluate", "runs/a"]


def test_commands_keep_their_programs_in_our_cache(monkeypatch, tmp_path, unset):
    found = command(monkeypatch, tmp_path, EVALUATE)
    assert Path(found).parent == tmp_path / "cache" / "programs"
    assert directory() is None


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        ([*EVALUATE, "--no-program-cache"], {}),
        (["--no-program-cache", *EVALUATE], {}),
        (EVALUATE, {"JAXTRANSFER_PROGRAM_CACHE": "0"}),
        (["models"], {}),  # compiles nothing
    ],
)
def test_none_are_kept(monkeypatch, tmp_path, unset, words, environment):
    assert command(monkeypatch, tmp_path, words, **environment) is None
    assert not (tmp_path / "cache").exists()


def test_only_commands_keep_programs():
    package = Path(programs.__file__).parents[1]
    setting = {path.name for path in package.rglob("*.py") if "jax_compilation_cache" in path.read_text()}
    assert setting == {"programs.py"}
    users = {path.relative_to(package) for path in package.rglob("*.py") if "programs_kept" in path.read_text()}
    assert users == {Path("cli/__init__.py"), Path("devices/programs.py")}
