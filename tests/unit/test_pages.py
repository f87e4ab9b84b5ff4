"""Pages say nothing that is not there: what they link to is in the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_in_the_repository(page: Path) -> None:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True)
    tracked = {ROOT / line for line in listed.stdout.splitlines()}
    folders = {folder for path in tracked for folder in path.parents}
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert links, "a page of ours without a link: is the pattern right?"
    gone = [link for link in links if (page.parent / link).resolve() not in tracked | folders]
    assert not gone, f"{page.relative_to(ROOT)} links to {', '.join(gone)}, which git does not have"
