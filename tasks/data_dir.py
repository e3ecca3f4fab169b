"""Where the publishers' files of benchmarks lie."""

from pathlib import Path

import gin

from qwen_jax.files import PathLike, as_path


@gin.configurable
def benchmark_files(data_dir: PathLike | None = None) -> Path | None:
    """The data directory.

    Args:
        data_dir: has a folder for each benchmark. None: their TFDS datasets.
    """
    return None if data_dir is None else as_path(data_dir, "data_dir")
