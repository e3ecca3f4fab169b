"""Comparisons of two answers, for preference models, reward models and DPO (report section 3.2.1); pack by `whole`.

| task | files |
|---|---|
| `preference_pairs` | your own JSON lines: `prompt` or `messages`, `chosen`, `rejected` |
| `hh_rlhf` | Anthropic's hh-rlhf: `helpful-base/train.jsonl.gz`, … |
| `stanford_shp` | Stanford's SHP: `reddit/askculinary/train.json`, … |
| `openai_summaries` | OpenAI's summarize-from-feedback: `comparisons/batch*.json` |

The mixture `preference_public` joins the three public ones, each in proportion to its size: a large set of comparisons
for pretraining a preference model.

Rows become pairs in `qwen_jax.data.pairs`; a pair is one example of two segments, which shuffling cannot part. Pairs
of one prompt are all held out, or none. docs/how_to/preference_data.md shows them.
"""

from collections.abc import Sequence

import gin

from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.pairs import PairRows
from qwen_jax.data.quick_seqio import seqio
from qwen_jax.data.records import Records, add_task, record_files
from qwen_jax.files import Pattern


@gin.configurable
def preference_pairs(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
) -> Records:
    """Pairs in the project's own layout, which trl's formats are too.

    Args:
        pattern: folder, glob, or list of these, of `.jsonl` and `.json` (also compressed).
        validation_share: share of the prompts held out.
        system: system message of a prompt without one.
        unusable: `stop` names the first pair that cannot be trained on, `leave_out` counts them by reason.
    """
    return _records("preference_pairs", PairRows("pairs", system), pattern, validation_share, unusable)


@gin.configurable
def hh_rlhf(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    system: str = DEFAULT_SYSTEM,
    unusable: str = "leave_out",
) -> Records:
    """Pairs of hh-rlhf; arguments as `preference_pairs`. Some rows of the publisher's files are no pairs."""
    return _records("hh_rlhf", PairRows("hh_rlhf", system), pattern, validation_share, unusable)


@gin.configurable
def stanford_shp(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    min_score_ratio: float = 1.0,
    system: str = DEFAULT_SYSTEM,
    unusable: str = "leave_out",
) -> Records:
    """Pairs of SHP with a `score_ratio` of at least `min_score_ratio`; other arguments as `preference_pairs`."""
    rows = PairRows("shp", system, min_score_ratio)
    return _records("stanford_shp", rows, pattern, validation_share, unusable)


@gin.configurable
def openai_summaries(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    system: str = DEFAULT_SYSTEM,
    unusable: str = "leave_out",
) -> Records:
    """Pairs of summaries of one post or article; arguments as `preference_pairs`."""
    return _records("openai_summaries", PairRows("summaries", system), pattern, validation_share, unusable)


def _records(task: str, rows: PairRows, pattern, validation_share: float, unusable: str) -> Records:
    files = record_files(pattern, task)
    return Records(files, validation_share=validation_share, rows=rows, unusable=unusable, task=task)


_PUBLIC = (hh_rlhf, stanford_shp, openai_summaries)
for _configurable in (preference_pairs, *_PUBLIC):
    add_task(_configurable.__name__, _configurable)

seqio.MixtureRegistry.add("preference_public", [(one.__name__, seqio.mixing_rate_num_examples) for one in _PUBLIC])
