"""tools/demo.py: what it takes on the command line."""

import pytest


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--output=here", 2)])
def test_a_word_that_asks_for_something_else_does_not_start_it(tool, monkeypatch, capsys, word, code):
    """It removes the run of the last time at its start."""
    demo = tool("demo")
    monkeypatch.setattr(demo.shutil, "rmtree", lambda *_, **__: pytest.fail("removed the last demo"))
    with pytest.raises(SystemExit) as ended:
        demo.main([word])
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert "runs/demo" in printed.out or "unrecognized arguments: --output=here" in printed.err
