"""cuDNN's attention: what is lowered for NVIDIA GPUs, what is refused, and, where there is one, its numbers."""

import functools
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from qwen_jax.models import kernels
from qwen_jax.models.config import ModelConfig
from qwen_jax.sharding import MESH_AXES, sum_over_replicas, use_mesh

LENGTH = 256


def shapes(batch=4, heads=4, kv_heads=2):
    query = jax.ShapeDtypeStruct((batch, heads, LENGTH, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((batch, kv_heads, LENGTH, 64), jnp.bfloat16)
    return query, key, key, jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32)


def gradients(packed):
    def loss(query, key, value, segment_ids):
        return jnp.sum(kernels.cudnn(query, key, value, segment_ids if packed else None).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.fixture
def cudnn_library(monkeypatch):
    """JAX asks the loaded cuDNN for its version even where it only lowers."""
    from jax._src.cudnn import fused_attention_stablehlo

    version = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)


@pytest.mark.parametrize(("packed", "call"), [(False, "fmhaSoftmax"), (True, "fmhaScaleBiasSoftmax")])
def test_forward_and_backward_are_cudnn_calls(packed, call, cudnn_library):
    text = jax.jit(gradients(packed)).trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert f"@__cudnn${call}(" in text and f"@__cudnn${call}Backward(" in text
    assert "CAUSAL" in text
    # Nothing of float32's [length, length] beside the kernel.
    assert f"{LENGTH}x{LENGTH}xf32" not in text


@pytest.mark.parametrize(("layout", "packed"), [((1, 4, 1, 2), True), ((2, 2, 1, 2), False)], ids=str)
def test_every_device_calls_it_on_its_own_rows_and_heads(layout, packed, cudnn_library):
    mesh = jax.make_mesh(layout, MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def of_replicas(*arrays):
        rows = dict(enumerate(arrays))
        of_copy = sum_over_replicas(
            lambda _, rows, __: gradients(packed)(*rows.values()), dict.fromkeys(rows, ("length",))
        )
        return of_copy(None, rows, None)

    with use_mesh(mesh):
        text = jax.jit(of_replicas).trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
    assert len(calls) == 2 and all(f"tensor<1x{LENGTH}x2x64xbf16>" in line for line in calls)


@pytest.mark.parametrize(
    ("changes", "shape", "packed", "message"),
    [
        ({"dtype": "float32"}, {}, False, "ModelConfig.dtype is float32"),
        ({"attention_dropout": 0.1}, {}, False, "attention_dropout is 0.1"),
        ({"head_dim": 160}, {}, False, "head_dim is 160"),
        ({}, {"sequence": 2}, False, "MeshConfig.sequence is 2"),
        ({}, {"data": 2}, True, "MeshConfig.data is 2"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, shape, packed, message):
    device = types.SimpleNamespace(platform="gpu")
    mesh = types.SimpleNamespace(devices=np.array([device]), shape=shape)
    config = ModelConfig(
        vocab_size=64, hidden_size=256, num_layers=1, num_heads=2, ffn_size=64, attention_kernel="cudnn", **changes
    )
    with pytest.raises(ValueError, match=message):
        kernels.resolve_kernel(config, 2048, mesh, packed)


def test_without_an_nvidia_gpu_it_is_refused():
    config = ModelConfig(
        vocab_size=64, hidden_size=256, num_layers=1, num_heads=2, ffn_size=64, attention_kernel="cudnn"
    )
    with pytest.raises(ValueError, match="NVIDIA GPUs, and the devices are cpus"):
        kernels.resolve_kernel(config, 2048)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="cuDNN's numbers need an NVIDIA GPU")
def test_its_numbers_are_those_of_the_reference(plain_environment, root):
    """In another process, because this one is kept to the CPU."""
    environment = {**plain_environment, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, __file__], env=environment, check=True)


def compare_with_the_reference():
    """Gradients in bfloat16 against float32's, packed and not, on the GPU of this process."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal(shape.shape), jnp.bfloat16) for shape in shapes()[:3]]
    wide = [x.astype(jnp.float32) for x in arrays]
    ids = jnp.asarray(np.cumsum(random.random((4, LENGTH)) < 0.02, axis=1, dtype=np.int32))

    def squares(attention):
        return lambda *qkv: jnp.sum(attention(*qkv).astype(jnp.float32) ** 2)

    for segment_ids in (None, ids):
        mask = kernels.causal_mask(LENGTH, segment_ids)
        found, exact = (
            jax.jit(jax.grad(squares(attention), (0, 1, 2)))(*inputs)
            for attention, inputs in (
                (functools.partial(kernels.cudnn, segment_ids=segment_ids), arrays),
                (functools.partial(kernels.dot_product_attention, mask=mask), wide),
            )
        )
        for one, other in zip(found, exact, strict=True):
            error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
            assert error < 0.02, (segment_ids is None, error)


if __name__ == "__main__":
    compare_with_the_reference()
