"""Pretraining corpora (report section 2.1): plain text, one document an example, loss on every token.

| task | content | source |
|---|---|---|
| `python_corpus` | sources and documentation of the installed Python, about 12 MB | any machine |
| `local_files` | your own folder or glob: `local_files.pattern = "corpus/**/*.jsonl.zst"` | files |
| `wikipedia_en`, `wikipedia_zh` | English and Chinese Wikipedia of June 2023 | TFDS |
| `c4_en`, `c4_zh` | web pages | TFDS |

The mixture `pretrain_public` joins the public ones. The report gives no rates, only that web pages, encyclopedias,
books and code are mixed, mostly English and Chinese, and that better sources are up-sampled.
"""

import functools
import importlib.util
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import gin

from qwen_jax.data.corpora import Corpus, list_files
from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.data.sources import DocumentSource, TfdsSource
from qwen_jax.data.vocabulary import QwenVocabulary
from qwen_jax.files import Pattern

OUTPUT_FEATURES = {"targets": seqio.Feature(QwenVocabulary(), add_eos=True, dtype=tf.int32)}

PREPROCESSORS = [
    functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
    # The tokens hold the text, so it is not cached beside them.
    functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos,
]

# Folders with tests, licenses that are the same everywhere, or tables of numbers rather than text.
_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "licenses", "site-packages"}
# Packages of the core and of the extra `data` that carry pages. The corpus, and the bits per byte of a model trained on
# it, would otherwise change with whatever else is installed; and lm_eval's pages quote the questions of benchmarks.
_DOCUMENTED = ("apache_beam", "dashscope", "flax", "numpy", "optax", "orbax", "scipy", "sklearn", "tensorflow_datasets")


@gin.configurable
def python_corpus(max_bytes: int = 15_000_000, validation_share: float = 0.02) -> Corpus:
    """Sources of the Python standard library, then Markdown and reStructuredText of packages in `_DOCUMENTED`.

    Args:
        max_bytes: largest size; files come in this order as long as they fit.
        validation_share: share of the files held out.
    """
    return Corpus(_python_files(max_bytes), validation_share=validation_share)


@functools.cache
def _python_files(max_bytes: int) -> tuple[Path, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    specs = [importlib.util.find_spec(name) for name in _DOCUMENTED]
    folders = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    wanted = [(library, "*.py"), *((folder, suffix) for folder in folders for suffix in ("*.md", "*.rst"))]
    files, size = [], 0
    for path in (path for folder, suffix in wanted for path in _files(folder, suffix)):
        if size + path.stat().st_size <= max_bytes:
            files.append(path)
            size += path.stat().st_size
    return tuple(files)


def _files(folder: Path, suffix: str) -> list[Path]:
    return [path for path in sorted(folder.rglob(suffix)) if not _LEFT_OUT & set(path.relative_to(folder).parts)]


@gin.configurable
def local_files(
    pattern: Pattern | Sequence[Pattern] | None = None, text_field: str = "text", validation_share: float = 0.01
) -> Corpus:
    """Files of the user.

    Args:
        pattern: folder, glob, or list of these; see `qwen_jax.data.corpora.list_files` for the formats.
        text_field: field of JSON lines or column of Parquet that holds the text.
        validation_share: share of the documents held out.
    """
    if not pattern:
        raise ValueError(
            "local_files does not know which files: set local_files.pattern = 'FOLDER OR GLOB' in a gin file, or give "
            "--gin.local_files.pattern on the command line"
        )
    return Corpus(list_files(pattern), text_field=text_field, validation_share=validation_share)


def _add(name: str, source: seqio.DataSource) -> None:
    seqio.TaskRegistry.add(name, source=source, preprocessors=PREPROCESSORS, output_features=OUTPUT_FEATURES)


_add("python_corpus", DocumentSource(python_corpus, num_shards=8))
_add("local_files", DocumentSource(local_files))

# TFDS has only `train` for Wikipedia; the last half percent of it is held out.
_WIKIPEDIA_SPLITS = {"train": "train[:99.5%]", "validation": "train[99.5%:]"}
_add("wikipedia_en", TfdsSource("wikipedia/20230601.en:1.0.0", _WIKIPEDIA_SPLITS))
_add("wikipedia_zh", TfdsSource("wikipedia/20230601.zh:1.0.0", _WIKIPEDIA_SPLITS))
_add("c4_en", TfdsSource("c4/en:3.1.0", {"train": "train", "validation": "validation"}))
_add("c4_zh", TfdsSource("c4/multilingual:3.1.0", {"train": "zh", "validation": "zh-validation"}))

seqio.MixtureRegistry.add(
    "pretrain_public",
    [("c4_en", 0.45), ("c4_zh", 0.30), ("wikipedia_en", 0.15), ("wikipedia_zh", 0.10)],
)
