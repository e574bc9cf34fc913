"""The README for a package index, where no files lie beside it: the rest of the package is in pyproject.toml.

Pictures are left out, and links to files become their paths in the source distribution, which has all of them.
"""

import pathlib
import re

from setuptools import setup

README = pathlib.Path(__file__).with_name("README.md")
PICTURE = re.compile(r"^!\[[^\]]*\]\((?!\w+:)[^)]*\)\n\n", re.M)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)#]*)[^)]*\)")
NOTE = "`pip install 'gpt_neo_sampling[cli]'` installs this. Paths below are those of the source distribution.\n\n"


def for_an_index(text):
    """README.md without what leads to files beside it."""
    title, rest = text.split("\n\n", 1)
    rest = LINK.sub(lambda link: f"{link[1]} (`{link[2]}`)", PICTURE.sub("", rest))
    return f"{title}\n\n{NOTE}{rest}"


setup(
    long_description=for_an_index(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
