"""The README for a package index, where no files lie beside it: the rest of the package is in pyproject.toml.

A picture is told in words, and a link to a file becomes its path in the source distribution, which has all of them.
"""

import pathlib
import re

from setuptools import setup

README = pathlib.Path(__file__).with_name("README.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)#]*)[^)]*\)")
NOTE = "`pip install 'gpt_neo_sampling[cli]'` installs this. Paths below are those of the source distribution.\n\n"


def in_words(link):
    """A picture or a link, by its words and its path."""
    is_picture, words, path = link.groups()
    return f"*Picture `{path}`: {words}*" if is_picture else f"{words} [`{path}`]"


title, rest = README.read_text(encoding="utf-8").split("\n\n", 1)
setup(
    long_description=f"{title}\n\n{NOTE}{LINK.sub(in_words, rest)}",
    long_description_content_type="text/markdown",
)
