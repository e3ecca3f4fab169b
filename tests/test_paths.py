"""Paths as people give them: never read as numbers, `~` is the home folder, in every flag, macro and parameter."""

import ast
import importlib
import sys
from pathlib import Path

import gin
import hypothesis
import pytest
from hypothesis import strategies as st

from qwen_jax import train
from qwen_jax.command_line import path_argument
from qwen_jax.configuration import load_gin
from qwen_jax.curation import configuration as _curation  # noqa: F401  registers what gin sets of curation
from qwen_jax.files import as_path, as_pattern, is_path_type
from qwen_jax.gin_internals import annotation, configurable_names, parameters

gin.configurable(train.train)
ROOT = Path(__file__).resolve().parent.parent
LOOKS_LIKE_A_NUMBER = ["20240115", "2024_11_29", "1e5", "None", "True", "0x10", "1.5", "-3", "[1]", "{}", "(a)", "#1"]
PATHS = st.sampled_from(LOOKS_LIKE_A_NUMBER) | st.text(
    st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]), min_size=1
).filter(lambda text: text == text.strip() and text[0] not in "@%'\"")


def run_with(*bindings):
    load_gin(["gin/runs/pretrain_tiny.gin"], bindings)
    return gin.get_bindings("train")


@hypothesis.given(text=PATHS)
@hypothesis.settings(max_examples=60)
@hypothesis.example(text="2024_11_29")
@hypothesis.example(text="None")
def test_a_path_on_the_command_line_is_that_path(text):
    settings = run_with(f"OUTPUT_DIR={text}", f"CACHE_DIR={text}")
    assert settings["output_dir"] == settings["cache_dir"] == text
    if not text.startswith("~"):
        assert path_argument(text) == as_path(text) == Path(text)
        assert as_pattern(text) == text


@pytest.mark.parametrize("text", LOOKS_LIKE_A_NUMBER)
def test_macros_and_parameters_of_all_kinds_take_it(text):
    folder = text if text != "None" else None  # these may be None
    settings = run_with(
        "OUTPUT_DIR=x",
        f"INITIAL_CHECKPOINT={text}",
        f"COMPILATION_CACHE={text}",
        f"VOCABULARY={text}",
        f"NgramPerplexity.path={text}",
    )
    assert settings["initial_checkpoint"] == settings["compilation_cache"] == folder
    assert gin.get_bindings("vocabulary_path")["path"] == folder
    assert gin.get_bindings("NgramPerplexity")["path"] == text
    assert gin.get_bindings("TrainerConfig")["train_steps"] == 400  # numbers stay numbers


def test_lists_references_and_quotes_stay_what_they_are(tmp_path):
    (tmp_path / "own.gin").write_text("include 'gin/runs/pretrain_tiny.gin'\nWHERE = 'a'\nOUTPUT_DIR = %WHERE\n")
    load_gin([str(tmp_path / "own.gin")], ["WHERE=2024", "local_files.pattern=['a', '2']", "CACHE_DIR='1e5'"])
    settings = gin.get_bindings("train")
    assert (settings["output_dir"], settings["cache_dir"]) == ("2024", "1e5")
    assert gin.get_bindings("local_files")["pattern"] == ["a", "2"]
    assert run_with("OUTPUT_DIR=x", "CACHE_DIR=%OUTPUT_DIR")["cache_dir"] == "x"


def test_home_folders_and_what_is_no_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/runs") == tmp_path / "runs" and path_argument("~") == tmp_path
    assert as_pattern("~/**/*.txt") == f"{tmp_path}/**/*.txt" and as_path("a/~") == Path("a/~")
    (tmp_path / "own.gin").write_text("TrainerConfig.seed = 1\n")
    load_gin(["~/own.gin"])
    for wrong, message in ((20240115, "found 20240115 .int.; in gin files"), (None, "found None"), ("", "nothing")):
        with pytest.raises(ValueError, match=f"OUTPUT_DIR: expected a path, .*{message}"):
            as_path(wrong, "OUTPUT_DIR")
    with pytest.raises(ValueError, match="no home folder ~nobody_of_that_name; write ./~nobody_of_that_name/x"):
        as_path("~nobody_of_that_name/x")


def test_every_parameter_with_the_name_of_a_path_is_one():
    """So that no macro that somebody sets it to is read as a number."""
    for module in ("tasks", "qwen_jax.perplexity"):
        importlib.import_module(module)
    found = set()
    for selector in configurable_names():
        for name in parameters(selector):
            if name.rpartition("_")[2] in (
                "path",
                "dir",
                "folder",
                "file",
                "pattern",
                "patterns",
                "checkpoint",
                "cache",
            ):
                if name == "pattern" and selector in ("ParameterGroup", "match_count", "matches_format"):
                    continue  # regular expressions: of names of parameters, and of text
                assert is_path_type(annotation(selector, name)), f"{selector}.{name}: annotate it with files.PathLike"
                found.add(name)
    assert {
        "output_dir",
        "cache_dir",
        "initial_checkpoint",
        "compilation_cache",
        "path",
        "pattern",
        "patterns",
    } <= found


def test_every_flag_with_the_name_of_a_path_is_one():
    names = ("output", "folder", "cache_dir", "checkpoint", "run", "runs", "json", "hlo", "log", "chart", "prompts")
    files = [*ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("qwen_jax/*.py")]
    seen = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args:
                kind = next((ast.unparse(word.value) for word in node.keywords if word.arg == "type"), "str")
                name = ast.unparse(node.args[0]).strip("'-")
                assert kind.rpartition(".")[2] != "Path", f"{file}: {name}: use command_line.path_argument"
                if name in names and kind != "int":
                    assert kind.endswith("path_argument"), f"{file}: --{name} has type {kind}"
                    seen += 1
    assert seen > 15


def test_a_tool_writes_into_the_home_folder(monkeypatch, tmp_path, root):
    """As shells do not expand `--output=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(root / "tools"))
    make_crawl = importlib.import_module("make_crawl")
    monkeypatch.setattr(sys, "argv", ["make_crawl.py"])
    make_crawl.main(["--output=~/crawl", "--pages=20"])
    assert (tmp_path / "crawl").is_dir() and not (tmp_path / "~").exists()
