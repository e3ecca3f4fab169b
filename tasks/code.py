"""Source code for Code-Qwen (report section 4): one file of a repository a document, loss on every token.

| task | content |
|---|---|
| `code_files` | JSON lines with `text` and `repository`, as `tools/make_code_corpus.py` writes them |
| `code_and_text` | a mixture: `code_files`, and `local_files` for the text |

The report continues pretraining on "code and text" of about 90 billion tokens and gives no rates: `code_share` sets
them. Repositories are held out whole, so that no held-out file has neighbors in training. docs/how_to/code_data.md
makes such a corpus.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin

from qwen_jax import files
from qwen_jax.data.corpora import LINE_SUFFIXES, Corpus, list_files, utf8
from qwen_jax.data.quick_seqio import seqio
from qwen_jax.data.sources import DocumentSource
from qwen_jax.files import Pattern
from tasks import pretrain


@dataclasses.dataclass(frozen=True)
class Repositories(Corpus):
    """Files of JSON lines whose documents are held out by repository."""

    def examples(self, path: Path) -> Iterator[tuple[str, dict[str, str | bytes]]]:
        """(repository, `text` and `source`) of the documents of one file.

        Raises:
            ValueError: a line lacks `text` or `repository`; the message has file and line.
        """
        for where, row in files.read_json_lines(path):
            fields = row if isinstance(row, dict) else {}
            text, repository = fields.get(self.text_field), fields.get("repository")
            if not isinstance(text, str) or not isinstance(repository, str):
                raise ValueError(
                    f"{where}: expected an object with the texts {self.text_field!r} and 'repository', found "
                    f"{', '.join(sorted(fields)) or type(row).__name__}; tools/make_code_corpus.py writes such files"
                )
            if text:
                yield repository, {"text": utf8(text), "source": utf8(f"{repository}/{fields.get('path', '')}")}

    def settings(self) -> dict:
        """As of a corpus, and what is held out together."""
        return super().settings() | {"held_out_by": "repository"}


@gin.configurable
def code_files(
    pattern: Pattern | Sequence[Pattern] | None = None, text_field: str = "text", validation_share: float = 0.01
) -> Repositories:
    """Source files with the repository that each is from.

    Args:
        pattern: folder, glob, or list of these, of `.jsonl` (also compressed).
        text_field: field that holds the text.
        validation_share: share of the repositories held out.
    """
    if not pattern:
        raise ValueError(
            "code_files does not know which files: set code_files.pattern = 'FOLDER OR GLOB' in a gin file, or give "
            "--gin.code_files.pattern on the command line"
        )
    found = list_files(pattern, LINE_SUFFIXES)
    return Repositories(found, text_field=text_field, validation_share=validation_share)


@gin.configurable
def code_share(share: float = 0.75) -> float:
    """Share of the tokens of `code_and_text` that are code.

    Args:
        share: in (0, 1). The report gives none; the default is ours.
    """
    if not 0 < share < 1:
        raise ValueError(f"code_share.share is {share}: it must be between 0 and 1; use code_files for code alone")
    return share


seqio.TaskRegistry.add(
    "code_files",
    source=DocumentSource(code_files),  # ty: ignore[invalid-argument-type]
    preprocessors=pretrain.PREPROCESSORS,
    output_features=pretrain.OUTPUT_FEATURES,
)
seqio.MixtureRegistry.add(
    "code_and_text",
    [("code_files", lambda task: code_share()), ("local_files", lambda task: 1 - code_share())],
)
