"""Programs compiled by one command are found by the next."""

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.compilation_cache import shared_cache


@pytest.fixture
def no_cache_of_the_session():
    """The tests have a cache of JAX's own, which would be used in place of the shared one."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def test_a_program_is_found_by_the_next_run_of_this_user(tmp_path, monkeypatch, no_cache_of_the_session):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = jnp.arange(8.0).reshape(2, 4)
    results = []
    for expected in ({"hits": 0, "misses": 1}, {"hits": 1, "misses": 0}):
        jax.clear_caches()
        with shared_cache().compiling() as found:
            program = jax.jit(lambda x: jnp.tanh(x) @ x.T).lower(rows).compile()
        assert found == expected
        results.append(program(rows).tolist())
    assert results[0] == results[1]
    assert jax.config.jax_compilation_cache_dir is None
    assert [path.parent.name for path in tmp_path.glob("*/*")] == ["qwen_jax"]


def test_a_cache_that_the_user_has_set_for_jax_is_left_alone(tmp_path, monkeypatch, no_cache_of_the_session):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    own = str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", own)
    with shared_cache().compiling():
        assert jax.config.jax_compilation_cache_dir == own
        jax.jit(lambda x: jnp.tanh(x) + 3).lower(1.0).compile()
    assert not (tmp_path / "shared").exists()
