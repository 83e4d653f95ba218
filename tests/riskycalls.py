"""Calls that run what a file says, or write where an archive says: found in the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

PICKLING = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
UNPICKLE = ("load", "loads", "open", "Unpickler")
YAML = ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")
SHELL = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
OTHER_CODE = ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter")
ARCHIVES = ("zipfile.ZipFile", "tarfile.open", "shutil.unpack_archive")
OWN_PICKLES = ("submitit", "ray", "multiprocessing")
"""Packages that pickle between their own processes; where they come in is listed by the test."""


def risks(source: str) -> Iterator[str]:
    """What is wrong with a module, one text for each place.

    Args:
        source: Text of the module.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                names[one.asname or one.name.partition(".")[0]] = (
                    one.name if one.asname else one.name.partition(".")[0]
                )
                yield from _imported(one.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for one in node.names:
                names[one.asname or one.name] = f"{node.module}.{one.name}"
            yield from _imported(node.module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _called(node, names)


def _imported(module: str) -> Iterator[str]:
    top = module.partition(".")[0]
    if top in PICKLING or top in OWN_PICKLES:
        yield f"import {top}"


def _called(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    first, dot, rest = ast.unparse(call.func).partition(".")
    name = names.get(first, first) + dot + rest
    last = name.rpartition(".")[2]
    top = name.partition(".")[0]
    given = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}
    checks: tuple[tuple[bool, str], ...] = (
        (top in PICKLING and last in UNPICKLE, name),
        (last == "loads" and "Pickler" in name, name),
        (name in ("eval", "exec", "builtins.eval", "builtins.exec"), name),
        (top == "yaml" and last in YAML, name),
        (name in (*SHELL, *OTHER_CODE, *ARCHIVES), name),
        (given.get("shell", "False") != "False", f"{name} through a shell"),
        (last in ("extract", "extractall"), name),
        (_weights(name) and given.get("weights_only") != "True", f"{name} of more than weights"),
        (top == "numpy" and given.get("allow_pickle", "False") != "False", f"{name} of pickles"),
    )
    yield from (text for found, text in checks if found)


_weights: Callable[[str], bool] = {
    "torch.load",
    "timm.models.load_state_dict",
    "timm.models.load_checkpoint",
}.__contains__
