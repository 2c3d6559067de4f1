"""The site: it builds from what is on the disk, nothing in it points nowhere or elsewhere for its looks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
LOADED = {"script": "src", "img": "src", "link": "href", "source": "srcset", "iframe": "src", "object": "data"}


class Page(HTMLParser):
    """What a page loads, where it links to, which ids it has."""

    def __init__(self, file: Path):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        named = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids |= {named[key] for key in ("id", "name") if key in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        elif tag in LOADED and LOADED[tag] in named and named.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(named[LOADED[tag]])


def build(folder: Path, *options: str) -> tuple[int, str]:
    """The exit code and what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder / "site", *options],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNDEFAULTENCODING": "0"},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("built")
    status, said = build(folder)
    assert status == 0, said
    return {path.resolve(): Page(path) for path in (folder / "site").rglob("*.html") if path.name != "404.html"}


def test_what_a_page_loads_lies_beside_it(site):
    for path, page in site.items():
        for target in page.loads:
            assert not urlsplit(target).scheme and not target.startswith("//"), f"{path.name} fetches {target}"
            assert (path.parent / unquote(urlsplit(target).path)).exists(), f"{path.name}: {target}"


def test_every_link_leads_to_a_page_and_a_place_in_it(site):
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].ids, f"{path.name}: {link}"


def test_style_sheets_fetch_nothing(site):
    root = min((path.parent for path in site), key=lambda folder: len(folder.parts))
    for sheet in root.rglob("*.css"):
        fetched = re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)", sheet.read_text(encoding="utf-8"))
        assert not fetched, f"{sheet.name}: {fetched}"


def test_formulas_are_drawn_by_the_browser_itself(site):
    assert all("arithmatex" not in path.read_text(encoding="utf-8") for path in site)
    assert [path.name for path, page in site.items() if path.parent.name == "concepts" and "math" in page.tags]
