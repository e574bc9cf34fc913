"""The package's rooms: data flows one way, and nothing imports upward (docs/architecture.md)."""

import ast
import importlib
from pathlib import Path

import pytest

import gpt_neo_sampling

PACKAGE = Path(gpt_neo_sampling.__file__).parent
# From the ground up: a module imports from its own floor, if it is in the same room, and from floors below.
FLOORS = [
    {"_types", "_json", "_version", "_compat", "_install", "_atomic_files", "_threads"},
    {"mesh"},
    {"sampling"},
    {"models"},
    {"checkpoint", "sample"},
    {"inspection"},
    {"generation"},
    {"cli"},
    {"_api"},
    {"", "chain", "decoder"},  # the package itself; old paths
]
OLD_PATHS = {"chain", "decoder", "models.masks", "models.penalties"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module):
    """The modules of the package that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if name.removeprefix("gpt_neo_sampling.") in MODULES}
            found.update(modules if modules == inside else modules | {node.module})
    names = {name.removeprefix("gpt_neo_sampling").lstrip(".") for name in found if name.startswith("gpt_neo_sampling")}
    return names & set(MODULES)


def floor(module):
    room = module.split(".")[0]
    (number,) = (i for i, rooms in enumerate(FLOORS) if room in rooms)
    return number, room


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upward(module):
    number, room = floor(module)
    for other in imports(module):
        below, of_room = floor(other)
        assert below < number or of_room == room or number == 0, f"{module} imports {other}"
        assert other not in OLD_PATHS, f"{module} imports {other}, an old path"


def test_no_module_needs_itself():
    ready = set()
    while ready != set(MODULES):
        more = {m for m in set(MODULES) - ready if imports(m) <= ready}
        assert more, f"in a circle: {sorted(set(MODULES) - ready)}"
        ready |= more


def test_a_checkpoint_needs_facts_alone():
    """Those of a config, and the controls that a generation_config.json may ask for."""
    assert imports("models.config") == {"_types"}
    of_checkpoint = {other for m in MODULES if m.split(".")[0] == "checkpoint" for other in imports(m)}
    assert {m for m in of_checkpoint if m.split(".")[0] in ("models", "sampling")} == {
        "models.config",
        "sampling.controls",
    }


@pytest.mark.parametrize(
    "old, new, name",
    [
        ("chain", "sampling.next_token", "next_token"),
        ("decoder", "models.decoding_context", "DecodeContext"),
        ("models.masks", "sampling.masks", "top_k_mask"),
        ("models.penalties", "sampling.penalties", "repetition_penalty"),
        ("models.utils", "sampling.categorical", "sample_categorical"),
        ("models.utils", "sampling.entmax", "entmax"),
    ],
)
def test_the_old_paths_lead_there(old, new, name):
    old, new = (importlib.import_module(f"gpt_neo_sampling.{module}") for module in (old, new))
    assert getattr(old, name) is getattr(new, name)
