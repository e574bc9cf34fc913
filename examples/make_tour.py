"""Makes tour.ipynb of tour.py, and runs it: what `make notebook` does.

    pip install '.[notebook]'
    python examples/make_tour.py

tour.py is the source, in jupytext's percent format, and the one to edit. The notebook holds its cells and what they
gave, without times and process numbers, so that making it again changes what has changed and nothing else.
"""

import pathlib

import jupytext
import nbformat
from nbclient import NotebookClient

SOURCE = pathlib.Path(__file__).parent / "tour.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


def read():
    """The notebook's cells without outputs, from tour.py."""
    notebook = jupytext.read(SOURCE)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return notebook


def run(notebook):
    """Runs the cells in a new process; raises nbclient's CellExecutionError where one fails."""
    resources = {"metadata": {"path": str(SOURCE.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()
    notebook.metadata.language_info = {"name": "python"}  # the kernel adds its version
    return notebook


def main():
    nbformat.write(run(read()), NOTEBOOK)
    print(NOTEBOOK)


if __name__ == "__main__":
    main()
