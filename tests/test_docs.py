"""What the docstrings, README.md and docs/*.md say: that all that is public is in them, and that their examples run."""

import contextlib
import dataclasses
import doctest
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import shlex

import pytest

import gpt_neo_sampling
from gpt_neo_sampling import checkpoint
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.cli.parser import parser
from gpt_neo_sampling.models import decoding_context as decoder
from gpt_neo_sampling.models import utils
from gpt_neo_sampling.sampling import next_token as chain

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
REFERENCE = ROOT / "docs" / "reference.md"
PUBLIC = {
    **{name: getattr(module, name) for module in (gpt_neo_sampling, utils, checkpoint) for name in module.__all__},
    **{c.__name__: c for c in (chain.next_token, chain.chain_distributions, chain.SamplingOptions, chain.History)},
    "DecodeContext": decoder.DecodeContext,
}
MADE_BY_USERS = ("TextGenerator",)  # of the classes that are no dataclasses
RAISES = re.compile(r"^ +raise (?:\w*(?:Value|Type|Mesh|Checkpoint|Distribution|Cluster)Error|Interrupted)\b", re.M)


def functions():
    """{name: function} for every public function, method and property."""
    found = {}
    for name, value in PUBLIC.items():
        if inspect.isfunction(value):
            found[name] = value
            continue
        for attribute, member in vars(value).items():
            function = getattr(member, "fget", getattr(member, "__func__", member))
            is_public = not attribute.startswith("_") or (attribute == "__init__" and name in MADE_BY_USERS)
            if inspect.isfunction(function) and is_public:
                found[f"{name}.{attribute}"] = function
    return found


def says(text, name):
    return re.search(rf"(?<!\w){name}(?!\w)", text) is not None


@pytest.mark.parametrize("name", functions())
def test_a_function_says_what_it_takes_and_raises(name):
    function = functions()[name]
    doc = inspect.getdoc(function)
    assert doc
    arguments = inspect.signature(function).parameters.keys() - {"self", "cls"}
    assert [a for a in arguments if not says(doc, a)] == []
    assert "Raises:" in doc or not RAISES.search(inspect.getsource(function))


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isclass(value)])
def test_a_class_says_what_it_holds(name):
    doc = vars(PUBLIC[name])["__doc__"]
    assert doc
    if dataclasses.is_dataclass(PUBLIC[name]) and name != "DecodeContext":  # much of which is mtf's
        assert [f.name for f in dataclasses.fields(PUBLIC[name]) if not says(doc, f.name)] == []


def test_public_names_are_in_the_docs():
    pages = [page for path, page in PAGES.items() if path != REFERENCE]
    assert [name for name in PUBLIC if not any(says(page, name) for page in pages)] == []


def test_public_names_are_in_the_api_reference():
    """Each once, under a path that it can be imported from."""
    paths = re.findall(r"^::: (\S+)$", PAGES[REFERENCE], re.M)
    found = [path.rpartition(".") for path in paths]
    assert sorted(name for *_, name in found) == sorted({name for _, _, name in found})
    assert PUBLIC.keys() - {name for *_, name in found} == set()
    assert [
        path for path, (module, _, name) in zip(paths, found) if not hasattr(importlib.import_module(module), name)
    ] == []


def test_public_names_are_tested():
    """Used in a test or an example, imports aside; methods and properties after a dot, also in the package."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    sources = [re.sub(r"^(from|import) .*?(\(.*?\n\)|$)", "", source, flags=re.M | re.S) for source in sources]
    sources += [example.source for test in DOCTESTS.values() for example in test.examples]
    assert [name for name in PUBLIC if not any(says(source, name) for source in sources)] == []
    sources += [path.read_text(encoding="utf-8") for path in (ROOT / "gpt_neo_sampling").rglob("*.py")]
    members = {name.split(".")[1] for name in functions() if "." in name and "__" not in name}
    assert members and [m for m in members if not any(re.search(rf"\.{m}\b", source) for source in sources)] == []


# --- Examples -----------------------------------------------------------------------------------


def doctests():
    """{name: doctest.DocTest} for the docstrings that have examples."""
    names = [module.name for module in pkgutil.walk_packages(gpt_neo_sampling.__path__, "gpt_neo_sampling.")]
    found = [test for name in names for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    return {test.name.removeprefix("gpt_neo_sampling."): test for test in found if test.examples}


DOCTESTS = doctests()


@pytest.fixture(scope="module")
def script():
    """The names that the script in models.utils' docstring defines; other docstrings' examples use them."""
    names = {}
    for example in DOCTESTS["models.utils"].examples[:-1]:
        exec(compile(example.source, "<the docstring of models.utils>", "exec"), names)
    return names


@pytest.fixture(scope="module")
def bundled():
    generator = gpt_neo_sampling.TextGenerator.from_pretrained()
    yield generator
    generator.close()


@pytest.mark.parametrize("name", DOCTESTS)
def test_docstring(name, script, bundled, monkeypatch):
    test = DOCTESTS[name]
    if name.startswith("generation.generator.TextGenerator."):
        monkeypatch.setattr(gpt_neo_sampling.TextGenerator, "from_pretrained", lambda: bundled)
    test.globs = {**script, **test.globs}
    out = io.StringIO()
    assert doctest.DocTestRunner().run(test, out=out.write).failed == 0, out.getvalue()


# --- README.md and docs/*.md: ```python blocks, and lines that begin with the command -----------------


def places(pattern):
    """{page and line: match} for a pattern in all pages."""
    found = ((path, match) for path, page in PAGES.items() for match in re.finditer(pattern, page, re.M | re.S))
    return {f"{path.name}:{1 + match.string.count(chr(10), 0, match.start())}": match for path, match in found}


COMMANDS = places(r"^(?P<prompt> {4}|\S*\$ +|)gpt-neo-sampling (?P<args>(?:\\\n|[^\n])*)\n")
# what is not there: other models, files of the reader's, machines, GPUs; and meshes, which are slow to build
NOT_HERE = {"--model", "--file", "--prompts-file", "--cluster", "--devices", "convert"}
PYTHON = places(r"^```python\n(?P<code>.*?)^```\n(?:\nprints\n\n```\n(?P<shown>.*?)^```\n)?")


def arguments(match):
    return shlex.split(match["args"].replace("\\\n", " "), comments=True)


# each once, of two that are the same the last
RUNS = {tuple(arguments(match)): place for place, match in COMMANDS.items()}
RUNS = {place: args for args, place in RUNS.items() if not NOT_HERE.intersection(args)}


@contextlib.contextmanager
def terminal():
    """Gives a function that returns what was written to stdout and stderr inside, in order."""
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        yield lambda: written.buffer.getvalue().decode()


@pytest.mark.parametrize("place", COMMANDS)
def test_the_command_takes_what_the_docs_give_it(place):
    parser().parse_args(arguments(COMMANDS[place]))


def example(place, is_slow):
    return pytest.param(place, marks=[pytest.mark.slow] * is_slow)


@pytest.mark.parametrize("place", [example(place, "README" not in place) for place in RUNS])
def test_the_command_prints_what_the_docs_show(place, bundled, monkeypatch, tmp_path):
    match, args = COMMANDS[place], arguments(COMMANDS[place])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    if "--plot" in args:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(gpt_neo_sampling.TextGenerator, "from_pretrained", lambda *args, **kwargs: bundled)
    with terminal() as text:
        assert cli.main(args) == 0
    assert all(path.stat().st_size > 0 for path in tmp_path.iterdir())  # pictures
    if match["prompt"] == "$ ":
        shown = re.split(r"^(?:```|\$ )", match.string[match.end() :], maxsplit=1, flags=re.M)[0]
        assert text().rstrip() == shown.rstrip()


# (tests/generation/test_export.py runs what is exported)
@pytest.mark.parametrize(
    "place",
    [example(place, "generator.generate(" in found["code"])
     for place, found in PYTHON.items() if "saved_model.load" not in found["code"]],
)  # fmt: skip
def test_python(place, bundled, monkeypatch):
    if "mesh_shape" not in PYTHON[place]["code"]:
        monkeypatch.setattr(gpt_neo_sampling.TextGenerator, "from_pretrained", lambda: bundled)
    vocab_dim = mtf.Dimension("vocab", 4)
    graph = contextlib.nullcontext() if "@tf.function" in PYTHON[place]["code"] else tf.Graph().as_default()
    with graph, terminal() as text:
        names = {"vocab_dim": vocab_dim, "step": 0, "logits": mtf.zeros(mtf.Mesh(mtf.Graph(), "mesh"), [vocab_dim])}
        exec(PYTHON[place]["code"], names)
    if PYTHON[place]["shown"]:
        assert text() == PYTHON[place]["shown"]
