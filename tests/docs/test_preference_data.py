"""Runs the commands of docs/how_to/preference_data.md, in order, in a copy of the repository."""

import re

from tests.pages import blocks, copy_repository, shell


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shown = [shell(text, tmp_path).stdout for kind, text in blocks("preference_data.md") if kind == "sh"]
    inspected, cached, queries, sampled = shown
    assert "⟦Eight minutes in boiling water, then cold water.⟪<|im_end|>⟫⟧\n--- segment 2: " in inspected
    assert re.search(r"preference_pairs +train +\d+ +\d+ +3 ", cached)
    assert "    left out 1 document, 0 tokens: equal sides\n" in cached
    assert re.search(r"--- segment 2: 2 tokens\n42\n--- filling: \d+ tokens", queries)
    assert "2,000 rows read; left out: none." in sampled
    of_all, chosen, drawn = (
        re.search(rf"\| {name} \| [\d,]+ \| ([\d,]+) \(", sampled)[1] for name in ("all", "chosen", "drawn")
    )
    assert int(of_all) == int(chosen) > int(drawn)
    assert (tmp_path / "runs" / "annotate.png").stat().st_size > 5000
