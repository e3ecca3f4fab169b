"""What the tests of the curation room share: the tools, a small crawl, and one run over it."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def crawl(tool, tmp_path_factory) -> Path:
    """The crawl of tools/make_crawl.py, of 60 articles."""
    folder = tmp_path_factory.mktemp("crawl") / "crawl"
    tool("make_crawl").make(folder, 60)
    return folder


@pytest.fixture(scope="session")
def inputs(crawl) -> dict[str, list[str]]:
    return {"books": [str(crawl / "books")], "web": [str(crawl / "web")]}


@pytest.fixture(scope="session")
def config(crawl):
    """English and Chinese, with the benchmark of the crawl, in several parts and units."""
    from qwen_jax.curation.contamination import ContaminationConfig
    from qwen_jax.curation.stages import CurationConfig

    return CurationConfig(
        contamination=ContaminationConfig(files=(str(crawl / "benchmark.jsonl"),)),
        weights={"books": 2.5},
        documents_per_part=40,
        unit_bytes=10_000,
    )


@pytest.fixture(scope="session")
def run(inputs, config, tmp_path_factory):
    """One finished run: its folder and manifest."""
    from qwen_jax.curation.pipeline import curate

    folder = tmp_path_factory.mktemp("run") / "corpus"
    return SimpleNamespace(folder=folder, manifest=curate(inputs, folder, config))
