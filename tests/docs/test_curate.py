"""Runs the commands of docs/how_to/curate.md, in order, in a copy of the repository."""

import json
import re

from tests.pages import blocks, copy_repository, shell


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shown = [shell(text, tmp_path).stdout for kind, text in blocks("curate.md") if kind == "sh"]
    reasons, cached = shown[4], shown[5]
    for reason in ("exact: duplicate", "fuzzy: near_duplicate", "scores: max_offensive", "contamination: in_benchmark"):
        assert reason in reasons
    assert "local_files" in cached
    manifest = json.loads((tmp_path / "scored" / "manifest.json").read_text())
    counters = manifest["counters"]
    assert counters["written_documents"]["books"] > 2 * counters["kept_source"]["books"] > 0
    assert (tmp_path / "scored" / "report.html").stat().st_size > 10_000


def test_every_parameter_that_the_page_names_exists(root):
    from qwen_jax.curation.contamination import ContaminationConfig
    from qwen_jax.curation.dedup import FuzzyConfig
    from qwen_jax.curation.stages import CurationConfig

    page = (root / "docs" / "how_to" / "curate.md").read_text(encoding="utf-8")
    for configurable, fields in (("make_config", CurationConfig), ("FuzzyConfig", FuzzyConfig)):
        names = re.findall(rf"\b{configurable}\.(\w+)", page)
        assert names and set(names) <= set(fields.__dataclass_fields__)
    assert {"words", "characters"} <= set(ContaminationConfig.__dataclass_fields__)
