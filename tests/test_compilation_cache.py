"""Programs compiled by one command are found by the next."""

import jax
import jax.numpy as jnp

from qwen_jax.compilation_cache import shared_cache


def test_a_program_is_found_by_the_next_run_of_this_user(tmp_path, monkeypatch):
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
