"""An extension of Griffe: doctests within docstrings become blocks of code."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?:^>>> .*(?:\n(?!\n).*)*\n?(?:\n(?=>>> ))?)+", re.MULTILINE)


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(
                lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", obj.docstring.value
            )
