"""Owns what can be checked of the documents: links lead somewhere, and both READMEs have the same parts.

Invariant: whatever is linked from a page of this repository is in it.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "export" / "README.md"])
MAX_README_LINES = 200


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_readme_is_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= MAX_README_LINES


def test_the_chinese_readme_has_the_parts_of_the_english_one():
    english, chinese = (prose(ROOT / name) for name in ("README.md", "README.zh.md"))

    def shape(text: str) -> tuple:
        rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        numbers = re.findall(r"\d[\d,.]*\d", "".join(line for line in text.splitlines() if line[:1] == "|"))
        return len(re.findall(r"^## ", text, re.MULTILINE)), rows, sorted(numbers)

    assert shape(chinese) == shape(english)
