"""Formulas become MathML when the site is built: browsers draw it themselves, in a font that lies beside the pages.

Pages write `$…$` and `$$…$$`, which the repository's host shows too. Markdown's extension `arithmatex` finds these and
leaves `\\(…\\)` and `\\[…\\]` in elements of that class; here they are translated. A mistake in one stops the build.
"""

from __future__ import annotations

import html
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

FOUND = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
TO_MATHML = LatexToMathML()


def on_files(files: Files, *, config: Any) -> Files:
    """The font, STIX Two Math, which the package `ziamath` brings along."""
    package = Path(find_spec("ziamath").origin).parent
    files.append(File.generated(config, "math.ttf", abs_src_path=str(package / "fonts" / "STIXTwoMath-Regular.ttf")))
    return files


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Called for each page's HTML."""

    def drawn(found: re.Match[str]) -> str:
        element, bracket, formula = found.groups()
        try:
            mathml = TO_MATHML.convert_with_local_state(html.unescape(formula), displaystyle=bracket == "[")
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: formula {formula.strip()}: {error}") from None
        return f'<{element} class="formula">{mathml}</{element}>'

    return FOUND.sub(drawn, content)
