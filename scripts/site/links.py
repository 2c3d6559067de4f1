"""Pages link to files of the repository as its host shows them; on the site those files come along.

`README.md` is the first page, other Markdown files of the root are pages too, whatever else is linked (a config, a
script) is copied. A link to a file that does not exist is left as it is, for the check of `--strict` to find.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
OUTSIDE = {site: repository for repository, site in PAGES.items()}
LINK = re.compile(r"(\]\()((?!https?:|mailto:|#)[^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """The files of the root that are pages."""
    for repository, site in PAGES.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / repository)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Every relative link of a page as the site has it."""
    here = page.file.src_uri
    source = OUTSIDE.get(here, f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        before, target, anchor, after = link.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/"):
            site = path.removeprefix("docs/")
        elif path in PAGES:
            site = PAGES[path]
        elif (ROOT / path).is_file() and not path.startswith(".."):
            site = f"repository/{path}"
            if files.get_file_from_path(site) is None:
                files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
        else:
            return link[0]
        return f"{before}{posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor}{after}"

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))
