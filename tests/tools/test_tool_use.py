"""tools/tool_use.py asserts its claims, counts chance, and each step is a command of its own."""

import json

import pytest

MEASURED = {
    "one_tool": {"selection": 0.3, "rouge_l": 0.9, "false_positive": 1.0},
    "tools": {"selection": 0.95, "rouge_l": 0.98, "false_positive": 0.02},
}


def changed(model: str, **figures) -> dict:
    return MEASURED | {model: MEASURED[model] | figures}


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        (MEASURED, []),
        (changed("one_tool", selection=0.6), [0]),
        (changed("one_tool", false_positive=0.2), [1]),
        (changed("tools", selection=0.85), [2]),
        (changed("tools", false_positive=0.3), [3]),
    ],
)
def test_a_claim_that_does_not_hold_fails(tool, found, failed):
    claims = tool("tool_use").claims(found)
    assert [index for index, (_, true) in enumerate(claims) if not true] == failed
    assert "95.0% right tools, at least 90% expected" in tool("tool_use").claims(MEASURED)[2][0]


def test_chance_is_that_of_the_listed_tools(tool, tmp_path):
    file = tmp_path / "tool_use/exam_plugin_made_react_positive.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"tools": count}) + "\n" for count in (2, 4)))
    chance = tool("tool_use").chance(tmp_path)
    assert chance == 0.375
    table = tool("tool_use").table(MEASURED, chance)
    assert "| any tool, always | 37.5% | – | 100.0% |\n" in table
    assert "| up to five | 95.0% | 0.980 | 2.0% |\n" in table
    tool("tool_use").draw(MEASURED, chance, tmp_path / "tool_use.png")
    assert (tmp_path / "tool_use.png").read_bytes().startswith(b"\x89PNG")


def test_both_models_answer_the_same_questions_and_no_cache_is_shared(tool, tmp_path):
    steps = tool("tool_use").steps(tmp_path, 0, False, [])
    measured = [step.words for step in steps if "qwen_jax.evaluate" in step.words]
    differ = [(one, other) for one, other in zip(*measured, strict=True) if one != other]
    assert [one.rpartition("/")[2] for one, _ in differ] == ["one_tool", "one_tool"]
    trained = [step.words for step in steps if "qwen_jax.train" in step.words]
    caches = [word for words in trained for word in words if "CACHE_DIR" in word]
    assert len(trained) == len(set(caches)) == 3
