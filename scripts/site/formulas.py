"""Formulas become MathML when the site is built: browsers draw it themselves, and fetch neither script nor font.

Pages write `$…$` and `$$…$$`, which the repository's host shows too. Markdown's extension `arithmatex` finds these and
leaves `\\(…\\)` and `\\[…\\]` in elements of that class; here they are translated. A mistake in one stops the build.
"""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

FOUND = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
TO_MATHML = LatexToMathML()


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
