# SPDX-License-Identifier: Apache-2.0
"""An extension of griffe: the formulas of docstrings as MathML, which browsers draw by themselves."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

BLOCK = re.compile(r"^( *)\.\. math::[ ]*(.*(?:\n(?:\1 +.*|[ ]*(?=\n\1 +)))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")


class Formulas(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = BLOCK.sub(block, obj.docstring.value)
            obj.docstring.value = INLINE.sub(lambda found: convert(found[1]), text)


def block(found: re.Match[str]) -> str:
    tex = " ".join(textwrap.dedent(found[2]).split())
    return f'{found[1]}<div class="formula">{convert(tex, display="block")}</div>\n'
