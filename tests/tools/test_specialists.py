"""tools/specialists.py goes on where it was stopped and asserts its claims; its data are of one kind a package."""

import json
import re
import subprocess

import pytest

from qwen_jax import files

MEASURED = {
    **{"base/code": 2.0, "base/text": 1.5, "code/code": 1.7, "code/text": 1.51},
    **{"base/arithmetic": 0.0, "math/arithmetic": 0.75},
}


@pytest.fixture
def specialists(tool):
    return tool("specialists")


def test_a_second_call_goes_on_after_the_last_finished_step(specialists, tool, tmp_path, monkeypatch, capsys):
    called, shown_commands = [], tool("shown_commands")

    def call(*words):
        if len(called) == 2:
            raise subprocess.CalledProcessError(1, words)
        called.append(words)

    monkeypatch.setattr(shown_commands, "call", call)
    steps = specialists.data_steps(tmp_path, False)
    with pytest.raises(subprocess.CalledProcessError):
        shown_commands.go(tmp_path, steps)
    monkeypatch.setattr(shown_commands, "call", lambda *words: called.append(words))
    shown_commands.go(tmp_path, steps)
    assert called == [step.words for step in steps]
    assert capsys.readouterr().out.count("done before: python tools/make_") == 2
    shown_commands.go(tmp_path, steps)
    assert len(called) == len(steps)


def test_seeds_share_data_and_vocabulary_and_nothing_else(specialists, tmp_path):
    first, second = (specialists.model_steps(tmp_path, seed, []) for seed in (0, 1))
    for one, other in zip(first, second, strict=True):
        changed = {word for word in one.words if word not in other.words}
        assert all(f"{tmp_path}/" in word or word == "--gin.SEED=0" for word in changed)
        assert not any("/data" in word or "/cache" in word or "vocabulary" in word for word in changed)


def wrong(**changes):
    return {**MEASURED, **{name.replace("_", "/"): value for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        (MEASURED, []),
        (wrong(code_code=1.9), [0]),
        (wrong(code_text=1.53), [1]),
        (wrong(base_arithmetic=0.1), [2]),
        (wrong(math_arithmetic=0.2), [3]),
    ],
    ids=["all hold", "code", "text", "before", "after"],
)
def test_each_claim_can_fail(specialists, found, failed):
    assert [place for place, (_, holds) in enumerate(specialists.claims(found)) if not holds] == failed


def test_figures_come_from_what_the_measuring_commands_write(specialists, tmp_path, capsys):
    for seed in range(2):
        measured = specialists.run_folder(tmp_path, seed) / "measured"
        for name in ("base", "code"):
            groups = [
                {"language": "x", "domain": domain, "bits_per_byte": MEASURED[f"{name}/{domain}"] + seed / 100}
                for domain in ("code", "text")
            ]
            (measured / name).mkdir(parents=True)
            files.write_json(measured / name / "perplexity.json", {"groups": groups})
        for name in ("base", "math"):
            (measured / f"{name}_arithmetic" / "arithmetic").mkdir(parents=True)
            score = {"metrics": {"score": 100 * MEASURED[f"{name}/arithmetic"]}}
            files.write_json(measured / f"{name}_arithmetic" / "arithmetic" / "scores.json", score)
    assert specialists.closing(tmp_path, 2, 60.0)
    shown = capsys.readouterr().out
    assert shown.count("holds") == 8 and "seed 1, code: " in shown
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| base | 2.005 (2.000 to 2.010) | 1.505 (1.500 to 1.510) | 0.0% (0.0% to 0.0%) |",
        "| code | 1.705 (1.700 to 1.710) | 1.515 (1.510 to 1.520) | – |",
        "| math | – | – | 75.0% (75.0% to 75.0%) |",
    ]
    assert (tmp_path / "specialists.png").read_bytes().startswith(b"\x89PNG")


def test_data_of_one_package_are_of_one_kind(tool, tmp_path, monkeypatch):
    data = tool("make_specialist_data")
    assert len({*data.TEXT, *data.CODE, *data.HELD_OUT}) == len(data.TEXT) + len(data.CODE) + len(data.HELD_OUT)
    monkeypatch.setattr(data, "TEXT", ("networkx",))
    monkeypatch.setattr(data, "CODE", ("absl-py",))
    monkeypatch.setattr(data, "HELD_OUT", ("click", "attrs"))
    flags = ["--output", str(tmp_path / "data"), "--text_size=20000", "--code_size=40000", "--held_out_size=9000"]
    data.main(flags)
    rows = {
        path.relative_to(tmp_path / "data"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((tmp_path / "data").rglob("*.jsonl"))
    }
    assert [str(path) for path in rows] == ["held_out/code.jsonl", "held_out/text.jsonl", "text/networkx.jsonl"]
    code, text, docs = rows.values()
    assert {row["domain"] for row in code} == {"code"} and {row["domain"] for row in text} == {"text"}
    assert all(re.match(r"(click|attrs?)/", row["source"]) for row in code)
    assert not any(">>>" in row["text"] for row in [*text, *docs]) and len({row["text"] for row in docs}) == len(docs)
    assert sum(len(row["text"]) for row in docs) <= 20_000
    repository = tmp_path / "data" / "repositories" / "absl-py"
    assert (repository / "LICENSE").exists() and list(repository.rglob("absl/**/*.py"))
    # The same again is left as it is; other data are refused.
    before = (tmp_path / "data" / "made.json").stat().st_mtime_ns
    data.main(flags)
    assert (tmp_path / "data" / "made.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="holds something else"):
        data.main([*flags, "--code_size=30000"])
