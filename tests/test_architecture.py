# SPDX-License-Identifier: Apache-2.0
"""The house rules, read off the imports: floors, no circles, short files and functions, a light core."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = {
    "research.core": 1,
    "research.data": 2,
    "research.models": 2,
    "research.objectives": 2,
    "research.hf": 3,
    "research.infer": 3,
    "research.adapt": 3,
    "research.rl": 4,
    "research.evals": 4,
    "research.train": 5,
    "research.scaling": 5,
    "research.recipes": 6,
    "launch": 7,
    "experiments": 8,
}
MAX_FILE, MAX_FUNCTION = 500, 80
LIGHT = ("research.core", "research.models", "research.objectives", "research.infer", "research.adapt")
LIGHT_FILES = ("research.train.step",)
LIGHT_IMPORTS = {"jax", "flax", "optax", "numpy", "qwix", "research"}
FLAX_ROOMS = ("research.models", "research.adapt")


def sources():
    return [
        path
        for top in ("research", "launch", "experiments", "benchmarks", "tests")
        for path in sorted((ROOT / top).rglob("*.py"))
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "research" else parts[0]


def imports(path: Path, *, lazy: bool) -> list[str]:
    """Modules that a file imports; ``lazy``: those inside functions too."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if not lazy and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / Path(*inner.split("."))).with_suffix(".py").exists()
                found.append(inner if is_module else node.module)
    return found


OURS = {
    module_name(path): path
    for path in sources()
    if module_name(path).split(".")[0] in ("research", "launch", "experiments")
}


@pytest.mark.parametrize("module", OURS)
def test_imports_only_point_down(module):
    if module == "research":
        return
    for other in imports(OURS[module], lazy=True):
        if room(other) in FLOORS and room(other) != room(module):
            assert FLOORS[room(other)] <= FLOORS[room(module)], f"{module} imports {other}, from a floor above"
            assert not (room(module) == "experiments" and room(other) == "launch"), f"{module} imports launch"


def test_no_import_circles():
    graph = {
        module: [o for o in imports(path, lazy=False) if o in OURS and o != module] for module, path in OURS.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= MAX_FUNCTION, node.name
    if text.strip():
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    if text.strip() and path.relative_to(ROOT).parts[0] != "tests":
        assert ast.get_docstring(ast.parse(text)), "a file begins by saying what it is for"


def test_the_training_loop_is_read_in_under_180_lines():
    assert (ROOT / "research" / "train" / "loop.py").read_text().count("\n") < 180


def test_only_models_and_adapt_import_flax():
    for module, path in OURS.items():
        if room(module) not in FLAX_ROOMS:
            assert not any(o.split(".")[0] == "flax" for o in imports(path, lazy=True)), module


def test_the_core_imports_only_what_a_bare_accelerator_image_has():
    for module, path in OURS.items():
        if room(module) in LIGHT or module in LIGHT_FILES:
            outside = {o.split(".")[0] for o in imports(path, lazy=True)} - LIGHT_IMPORTS - sys.stdlib_module_names
            assert not outside, f"{module} imports {outside}"


def test_the_step_does_not_load_what_it_does_not_need():
    """Importing the step and the loop loads no TFDS, SentencePiece, Orbax, matplotlib or scipy."""
    heavy = ("tensorflow_datasets", "sentencepiece", "orbax", "matplotlib", "scipy.optimize", "tensorboardX")
    script = f"import sys; import research.train.loop; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
