"""Links between pages lead somewhere, and so does every page that a source file or gin file names."""

import re
import subprocess
import tomllib

import pytest

PAGE = re.compile(r"\bdocs/[\w/]+\.(?:md|png)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.fixture(scope="module")
def tracked(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [root / name for name in listed.stdout.split("\n") if name]


def test_links_lead_to_files(tracked, root):
    pages = [path for path in tracked if path.suffix == ".md" and path.exists()]
    assert len(pages) > 10
    broken = [
        f"{page.relative_to(root)}: {link}"
        for page in pages
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert not broken


def test_pages_that_sources_name_exist(tracked, root):
    broken = [
        f"{path.relative_to(root)}: {name}"
        for path in tracked
        if path.suffix in {".py", ".gin", ".md", ".toml"} and path.exists()
        for name in PAGE.findall(path.read_text(encoding="utf-8"))
        if not (root / name).exists() and "runs/" not in name
    ]
    assert not broken


def test_the_index_lists_every_page(root):
    index = (root / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path for path in (root / "docs").rglob("*.md") if path.name != "README.md"]
    assert not [path.name for path in pages if f"]({path.relative_to(root / 'docs')})" not in index]


def anchors(text: str) -> set[str]:
    """Names of the sections of a page, as GitHub makes them, and those of its own."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one).strip().lower().replace(" ", "-") for one in headings} | set(
        re.findall(r'<a id="([^"]+)"', text)
    )


def test_links_to_sections_lead_to_sections(tracked, root):
    pages = [path for path in tracked if path.suffix == ".md" and path.exists()]
    broken = [
        f"{page.relative_to(root)}: {link}#{section}"
        for page in pages
        for link, section in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if section not in anchors((page.parent / link if link else page).read_text(encoding="utf-8"))
    ]
    assert not broken


def test_tests_that_pages_name_exist(tracked, root):
    broken = [
        f"{page.relative_to(root)}: {name}"
        for page in tracked
        if page.suffix == ".md" and page.exists()
        for name in re.findall(r"`(tests/[\w/]+\.\w+)`", page.read_text(encoding="utf-8"))
        if not (root / name).exists()
    ]
    assert not broken


def test_the_readme_lists_every_extra(root):
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    listed = re.findall(r"^\| (`[^|]+) \|", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(extras) <= {name for cell in listed for name in re.findall(r"`(\w+)`", cell)}
