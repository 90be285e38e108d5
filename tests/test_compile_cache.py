"""The tests' compilation cache: shared, bounded, and off where it is told to be."""

import os
import subprocess
import sys

import compile_cache

PROGRAM = """
import jax, jax.numpy as jnp
print(jax.jit(lambda x: jnp.sin(x) * 3 + 0.125)(jnp.ones(7))[0])
"""


def entries_after(environment, folder):
    """Runs a program in a process of its own; returns how many compiled programs the cache holds then."""
    environment = {**os.environ, **environment}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True)
    return len(list(folder.glob("*-cache")))


def test_a_process_that_a_test_starts_fills_and_finds_the_cache(tmp_path):
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment = {**chosen, **compile_cache.variables(chosen)}
    filled = entries_after(environment, tmp_path)
    assert filled > 0
    assert entries_after(environment, tmp_path) == filled


def test_a_folder_that_the_user_chose_stays_and_the_switch_turns_it_off(monkeypatch, tmp_path):
    assert "JAX_COMPILATION_CACHE_DIR" in compile_cache.variables({})
    assert "JAX_COMPILATION_CACHE_DIR" not in compile_cache.variables({"JAX_COMPILATION_CACHE_DIR": "/somewhere"})
    assert compile_cache.variables({"JAX_ENABLE_COMPILATION_CACHE": "false"}) == {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.folder().is_relative_to(tmp_path)


def test_what_was_written_longest_ago_goes_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    compile_cache.prune(tmp_path, largest=25)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["middle", "new"]
    compile_cache.prune(tmp_path / "nothing there")
