"""Compiles a program of a run for NVIDIA GPUs, on a machine without one, and reports its memory and estimated time.

    python tools/compile_for_gpu.py --gin_file=gin/runs/sft_7b.gin --gin_file=gin/hardware/h200_8.gin \\
        --gin.INITIAL_CHECKPOINT=none

It takes 10 to 30 seconds of one core and 1 GB of memory. Needs JAX's plugin for CUDA and cuDNN, but no driver
(docs/how_to/gpu_clusters.md says how to have them beside an environment for CPUs).

**The program is not the one that a GPU gets, to the last instruction**: XLA tries several forms of a product on the GPU
and takes the fastest (autotuning), which here it cannot, and what cuDNN needs as workspace is not known. Memory,
operations and collectives are those of the same graph. The estimate of time takes nine tenths of the sheet's
operations per second, which no GPU of this kind keeps up: read it as a bound, not as what to expect.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# There is no device to try anything on.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

from compiling import compile_for

from qwen_jax.command_line import run


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    return compile_for(__doc__ or "", True, argv)


if __name__ == "__main__":
    run(main)
