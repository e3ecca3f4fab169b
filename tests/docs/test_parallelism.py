"""docs/reference/parallelism.md: its table is the one that is used."""

import re

from qwen_jax.sharding import RULES


def test_the_rule_table_of_the_page_is_the_one_in_use(root):
    page = (root / "docs/reference/parallelism.md").read_text().partition("## The table")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    shown = {name: tuple(re.findall(r"`(\w+)`", axes)) for name, axes in rows}
    assert shown == {name: (axes,) if isinstance(axes, str) else axes or () for name, axes in RULES.items()}
