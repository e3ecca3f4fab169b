"""The gin configuration of a curation run: `make_config` and its parts."""

import glob
import os
from collections.abc import Mapping, Sequence

import gin

from qwen_jax.curation.contamination import SUFFIXES, ContaminationConfig
from qwen_jax.curation.dedup import FuzzyConfig
from qwen_jax.curation.quality import CHINESE, Rules
from qwen_jax.curation.scoring import LinearClassifier, NgramPerplexity, ScoreFilter
from qwen_jax.curation.stages import CurationConfig
from qwen_jax.files import Pattern, as_pattern

for _configurable in (FuzzyConfig, Rules, LinearClassifier, NgramPerplexity, ScoreFilter):
    gin.external_configurable(_configurable, module="qwen_jax.curation")


@gin.configurable
def chinese_rules(**changes) -> Rules:
    """`quality.CHINESE` with other thresholds."""
    return Rules(**{**vars(CHINESE), **changes})


@gin.configurable
def benchmarks(patterns: Pattern | Sequence[Pattern] = (), **changes) -> ContaminationConfig:
    """Files of evaluation sets: folders, in which all readable files but licenses and read-mes count, and globs.

    Raises:
        FileNotFoundError: nothing matches a pattern.
    """
    files = set()
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        pattern = as_pattern(pattern, "benchmarks.patterns")
        if os.path.isdir(pattern):
            found = glob.glob(os.path.join(glob.escape(pattern), "**", "*"), recursive=True)
        else:
            found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = [path for path in found if path.lower().endswith(SUFFIXES) and os.path.isfile(path)]
        if os.path.isdir(pattern):
            found = [path for path in found if not os.path.basename(path).upper().startswith(("LICENSE", "README"))]
        if not found:
            raise FileNotFoundError(f"no benchmark file ({', '.join(SUFFIXES)}) matches {pattern!r}")
        files.update(os.path.abspath(path) for path in found)
    return ContaminationConfig(files=tuple(sorted(files)), **changes)


@gin.configurable
def make_config(
    rules: Mapping[str, Rules] | None = None,
    contamination: ContaminationConfig | None = None,
    scores: Sequence[ScoreFilter] = (),
    languages: Sequence[str] | None = ("en", "zh"),
    **settings,
) -> CurationConfig:
    """The configuration of a run; see `CurationConfig`. `rules` of None are those for English and Chinese.

    Raises:
        ValueError: an unknown parameter, or a value out of range.
    """
    if rules is not None:
        settings["rules"] = dict(rules)
    if contamination is not None:
        settings["contamination"] = contamination
    languages = None if languages is None else tuple(languages)
    unknown = sorted(set(settings) - {field for field in CurationConfig.__dataclass_fields__})
    if unknown:
        raise ValueError(f"make_config.{unknown[0]}: no such parameter; see qwen_jax.curation.stages.CurationConfig")
    return CurationConfig(languages=languages, scores=tuple(scores), **settings)
