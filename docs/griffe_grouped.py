"""An extension of Griffe, which reads the docstrings: `a, b: text` in an Args section documents a and b."""

import re

import griffe

GROUP = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:,\s+\*{0,2}\w+)+):(?P<text>.*(?:\n(?P=indent) +.*)*)", re.M)


class GroupedArguments(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = GROUP.sub(_one_by_one, obj.docstring.value)


def _one_by_one(match):
    return "\n".join(f"{match['indent']}{name}:{match['text']}" for name in re.split(r",\s+", match["names"]))
