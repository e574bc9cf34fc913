"""A hook of MkDocs (mkdocs.yml): pages that lie outside docs/, and links that work on the site and in the repository.

Links in the documents are relative paths in the repository, as a browser of the repository follows them. On the site a
link to a page or a picture leads to it; one to any other file of the repository, which the site does not hold, becomes
its path. A link to nothing stays as it is, and `mkdocs build --strict` fails on it.
"""

import os
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
# files that become pages: where they are in the repository, and on the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "gpt_neo_sampling/demo/README.md": "bundled-model.md",
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files, config):
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    on_site = {pathlib.Path(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}
    here = pathlib.Path(page.file.abs_src_path).parent

    def link(match):
        target = pathlib.Path(os.path.normpath(here / match["path"]))
        if target in on_site:
            path = posixpath.relpath(on_site[target], posixpath.dirname(page.file.src_uri) or ".")
            return f"{match['image']}[{match['text']}]({path}{match['anchor'] or ''})"
        if target.exists() and target.is_relative_to(ROOT) and not match["image"]:
            path = target.relative_to(ROOT).as_posix()
            return f"`{path}`" if path.endswith(match["text"]) else f"{match['text']} (`{path}`)"
        return match[0]

    return LINK.sub(link, markdown)
