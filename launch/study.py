# SPDX-License-Identifier: Apache-2.0
"""Study files: ``path/to/study.py`` or ``path/to/study.py:function`` becomes experiments and an analysis."""

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from research.core.config import field_types, override
from research.core.types import UserError
from research.train.experiment import Experiment

MAX_NAME = 200  # of a folder; file systems allow 255


@dataclass(frozen=True)
class Study:
    """A loaded study. ``name`` is also the name of its folder under the folder of runs; ``overrides`` are in its
    experiments."""

    name: str
    reference: str
    experiments: dict[str, Experiment]
    analyze: Callable[..., Any] | None
    overrides: tuple[str, ...] = ()

    def only(self, name: str) -> Experiment:
        if name not in self.experiments:
            names = ", ".join(list(self.experiments)[:20])
            raise UserError(f"{self.reference} has no experiment {name!r}; it has: {names}.")
        return self.experiments[name]


def load(reference: str, overrides: Sequence[str] = ()) -> Study:
    """Reads a study and applies ``path=value`` overrides to each of its experiments, ``NAME.path=value`` to the one of
    that name.

    A study with overrides has a folder of its own, so that the plain study's runs stay as they are.
    """
    path_text, _, function = reference.partition(":")
    module = load_module(Path(path_text))
    function = function or "sweep"
    sweep = getattr(module, function, None)
    if not callable(sweep):
        raise UserError(
            f"{path_text} has no function {function}(): a study exports sweep() -> dict of name to Experiment."
        )
    with told(path_text):
        experiments = sweep()
    if not (isinstance(experiments, dict) and all(isinstance(e, Experiment) for e in experiments.values())):
        raise UserError(f"{function}() of {path_text} must return a dict of name to Experiment.")
    if not experiments:
        raise UserError(f"{function}() of {path_text} returned no experiment.")
    analyze = getattr(module, "analyze", None)
    if analyze is not None and not callable(analyze):
        raise UserError(f"analyze in {path_text} is not a function: define analyze(runs, out), or leave it out.")
    owned = [(_owner(assignment, experiments), assignment.strip()) for assignment in overrides]
    changed = {}
    for name, experiment in experiments.items():
        mine = [text.removeprefix(f"{owner}.") for owner, text in owned if owner in (None, name)]
        if any(text.partition("=")[0].strip() == "name" for text in mine):
            raise UserError("--set name=... would rename runs: the names are the keys of the study's dict.")
        changed[name] = replace(override(experiment, *mine), name=name)
    parts = [Path(path_text).stem] + ([function] if function != "sweep" else [])
    folder = "-".join(parts) + "".join("@" + re.sub(r"[^\w.=+-]", "_", o) for o in sorted(overrides))
    return Study(folder[:MAX_NAME], reference, changed, analyze, tuple(overrides))


def _owner(assignment: str, names: Collection[str]) -> str | None:
    """The experiment that an override is for, where it begins with its name. Raises UserError where it begins with
    neither a name nor a field."""
    text = assignment.strip()
    if (head := re.split("[.=]", text)[0]) in field_types(Experiment):
        return None
    owner = max((name for name in names if text.startswith(f"{name}.")), key=len, default=None)
    if owner is None and "=" in text and "." in text.partition("=")[0]:
        listed = ", ".join(list(names)[:20])
        raise UserError(
            f"--set {text}: {head!r} is neither a field of experiments ({', '.join(field_types(Experiment))}) nor one "
            f"of the study's runs ({listed})."
        )
    return owner


def load_module(path: Path) -> ModuleType:
    if path.is_dir() or not path.exists():
        raise UserError(f"There is no study {path}: give the path of a Python file that defines sweep().")
    root = Path.cwd()
    inside = path.resolve().is_relative_to(root)
    # the name that `import` would give it, so that classes defined in a study are found again by name
    name = ".".join(path.resolve().relative_to(root).with_suffix("").parts) if inside else f"study_{path.stem}"
    if inside and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: a study is one, with a function sweep().")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with told(str(path)):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """Turns what goes wrong inside a study's own code into one sentence with the line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename} is not Python: {error.msg} (line {error.lineno}).") from error
    except (Exception, SystemExit) as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        line = f" (line {place.tb_lineno} of {place.tb_frame.f_code.co_filename})" if place else ""
        text = " ".join(str(error).split())
        raise UserError(f"{path} fails with {type(error).__name__}: {text}{line}.") from error
