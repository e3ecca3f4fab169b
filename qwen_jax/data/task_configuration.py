"""Configurable functions of `tasks/`, found without importing it: a run on cached data needs no TensorFlow.

Gin knows a function when its module is imported, and modules of `tasks/` import SeqIO, thus TensorFlow. Their sources
say which functions are configurable, so stand-ins with the same names and parameters are registered instead. Bindings
are kept under the name: the functions themselves find them when `tasks` is imported later.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin

from qwen_jax.files import PathLike, Pattern

PACKAGE = "tasks"


def declare_configurables() -> None:
    """Registers a stand-in for each `@gin.configurable` function of `tasks/`, unless `tasks` is imported already."""
    if PACKAGE in sys.modules:
        return
    for module, function in _configurable_functions():
        name = f"{module}.{function.name}"
        if name not in _declared:
            _declared.add(name)
            gin.external_configurable(_stand_in(function), name=function.name, module=module)


_declared: set[str] = set()


def is_bound() -> bool:
    """Whether gin's configuration sets a parameter of `tasks/`; True too where `tasks` is imported."""
    names = (f"{module}.{function.name}" for module, function in _configurable_functions())
    return PACKAGE in sys.modules or any(gin.get_bindings(name, resolve_references=False) for name in names)


def import_tasks() -> bool:
    """Imports `tasks`, for configurables that their sources do not show.

    Returns:
        Whether this call imported it; False if it was imported before, or needs packages that are not installed.
    """
    if PACKAGE in sys.modules:
        return False
    try:
        importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in (PACKAGE, "qwen_jax"):
            raise
        return False
    return True


def _configurable_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
                if isinstance(node, ast.FunctionDef) and any(map(_is_gin_configurable, node.decorator_list)):
                    yield f"{PACKAGE}.{path.stem}", node


def _is_gin_configurable(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Attribute) and ast.unparse(decorator) == "gin.configurable"


# Names of annotations that say how gin reads a value of the command line.
_PATH_NAMES = {"PathLike": PathLike, "Pattern": Pattern, "Sequence": Sequence}


def _path_annotation(annotation: ast.expr | None) -> str:
    """The annotation of a path parameter, with its colon; empty for others, whose names may be unknown here."""
    if annotation is None:
        return ""
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return f": {ast.unparse(annotation)}" if names and names <= set(_PATH_NAMES) else ""


def _stand_in(function: ast.FunctionDef):
    """A function of the same name and parameters that does nothing."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    parameters = ", ".join(f"{one.arg}{_path_annotation(one.annotation)}=None" for one in every)
    keywords = f", **{given.kwarg.arg}" if given.kwarg else ""
    source = f"def {function.name}({parameters}{keywords}): pass".replace("(, ", "(")
    namespace: dict = dict(_PATH_NAMES)
    exec(source, namespace)  # names come from the syntax tree of a module that is importable anyway
    return namespace[function.name]
