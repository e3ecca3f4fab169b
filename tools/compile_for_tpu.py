"""Compiles a program of a run for a TPU pod, on a machine without one, and reports its memory and estimated time.

    python tools/compile_for_tpu.py --gin_file=gin/runs/pretrain_7b.gin --gin_file=gin/hardware/v5p_256.gin

It takes one to two minutes (of TPU v6e up to five) and 3 GB of memory. Needs libtpu
(`pip install -c requirements.txt "jax[tpu]"`).
"""

import os

from qwen_jax.programs import compiler_log

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# No device is opened, so there is nothing that two processes could take from each other.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
for _name, _value in compiler_log.ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from compiling import compile_for

from qwen_jax.command_line import run


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    return compile_for(__doc__ or "", False, argv)


if __name__ == "__main__":
    run(main)
