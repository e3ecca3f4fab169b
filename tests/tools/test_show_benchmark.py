"""tools/show_benchmark.py: what a benchmark reads, and its prompts."""

import pytest

from tests.evaluation.published import FILES


@pytest.fixture
def show(tool, tmp_path, capsys):
    for name in ("ceval", "ocnli"):
        (tmp_path / name).mkdir()
        FILES[name].write(tmp_path / name)

    def run(*arguments: str) -> str:
        tool("show_benchmark").main([*arguments, "--data_dir", str(tmp_path)])
        return capsys.readouterr().out

    return run


def test_counts_rows_left_out_and_a_prompt_with_its_answer(show, tmp_path):
    lines = show("ocnli").splitlines()
    assert "examples:   3 of 2,950 published" in lines
    first = tmp_path / "ocnli/data/ocnli/dev.json:3"
    assert f"left out:   1: annotators did not agree: the first is {first}" in lines
    assert lines[-7:] == [
        "⟦语句一：“今天第0次下雨”",
        "语句二：“地是湿的”",
        "请问这两句话是什么关系？",
        "⟧",
        "  ⟦矛盾⟧",
        "→ ⟦蕴含⟧",
        "  ⟦无关⟧",
    ]


def test_a_subject_and_the_prompt_for_chat_models(show):
    found = show("ceval", "--subject", "law", "--num_examples", "2", "--chat")
    assert "subjects:   college_physics 2, law 2, logic 2" in found
    assert "--- law/0\n⟦law 0, which one?\n\nA. one\n" in found and "\n→ B\n" in found


def test_an_unknown_subject_or_benchmark_is_refused(show):
    with pytest.raises(ValueError, match="ceval has no subject 'laws' here; it has college_physics, law, logic"):
        show("ceval", "--subject", "laws")
    with pytest.raises(ValueError, match="did you mean ocnli"):
        show("ocnl")


def test_the_table_of_the_page_is_that_of_the_registry(tool, root):
    page = (root / "docs/reference/benchmarks.md").read_text(encoding="utf-8")
    table = tool("show_benchmark").table()
    missing = [line for line in table.splitlines() if line not in page.splitlines()]
    assert not missing, "lines of `tools/show_benchmark.py --table` that the page lacks"
    assert table in page
