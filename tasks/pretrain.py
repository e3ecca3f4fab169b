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
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import gin

from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.data.sources import Corpus, DocumentSource, TfdsSource, list_files
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

# Folders with tests, licenses that are the same everywhere, tables of numbers rather than text, or pages about
# benchmarks, which quote their questions (lm_eval).
_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "licenses", "site-packages", "lm_eval"}


@gin.configurable
def python_corpus(max_bytes: int = 15_000_000, validation_share: float = 0.02) -> Corpus:
    """Sources of the Python standard library, then Markdown and reStructuredText of the installed packages.

    Args:
        max_bytes: largest size; files come in this order as long as they fit.
        validation_share: share of the files held out.
    """
    return Corpus(_python_files(max_bytes), validation_share=validation_share)


@functools.cache
def _python_files(max_bytes: int) -> tuple[Path, ...]:
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    sources = [path for path in sorted(library.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(library).parts)]
    pages = sorted(path for suffix in ("*.md", "*.rst") for path in packages.rglob(suffix))
    pages = [path for path in pages if not _LEFT_OUT & set(path.relative_to(packages).parts)]
    files, size = [], 0
    for path in [*sources, *pages]:
        if size + path.stat().st_size <= max_bytes:
            files.append(path)
            size += path.stat().st_size
    return tuple(files)


@gin.configurable
def local_files(
    pattern: Pattern | Sequence[Pattern] | None = None, text_field: str = "text", validation_share: float = 0.01
) -> Corpus:
    """Files of the user.

    Args:
        pattern: folder, glob, or list of these; see `qwen_jax.data.sources.list_files` for the formats.
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
