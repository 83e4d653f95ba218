"""Mutation check: do the tests of a module notice when one thing in it is changed?

``python tests/mutants.py [MODULE...]`` in the root of the project. ``tests/mutants.toml`` names the
modules, the tests of each, and why the mutants that are left are no gap. A mutant that is left and
not explained fails, and so does an explanation of none that is left.

Each mutant has a process of its own, forked after torch and the like are imported, in which the
module is compiled from the changed tree: no file is written.
"""

from __future__ import annotations

import ast
import gc
import importlib
import os
import re
import resource
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import takewhile
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from hypothesis import Phase, settings

LISTED = Path("tests/mutants.toml")
MEMORY = 64 * 2**30
"""Bytes of address space (torch takes some): a mutant may ask for an array of any size."""
AROUND = 24
"""Letters of the line that a mutant's name holds before and after the change."""
DEFINITION = re.compile(r" *(?:def|class) (\w+)")

OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult, ast.FloorDiv),
    ast.FloorDiv: (ast.Mult, ast.Div),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
PAIRS = ("min max", "any all", "floor ceil", "fmin fmax", "clamp_min clamp_max", "sin cos")
NAMES = {a: b for pair in PAIRS for a, b in (pair.split(), reversed(pair.split()))}
Field = tuple[ast.AST, str, int | None]
"""Node, name of one of its fields, place where that is a list."""


def instead(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand where ``node`` stands."""
    for other in OPERATORS.get(type(node), ()):
        yield other()
    match node:
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Name(id=name) if name in NAMES:
            yield ast.Name(NAMES[name], node.ctx)
        case ast.Attribute(value, attr=name) if name in NAMES:
            yield ast.Attribute(value, NAMES[name], node.ctx)
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()
        case ast.Constant(value=value):
            yield from map(ast.Constant, others(value))


def others(value: object) -> list[object]:
    """What a literal may be in place of itself."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1]
        case float():
            return [value * 2, value / 2] if value else [1.0]
        case str():
            return [value + "!"]
    return []


def fields(tree: ast.AST) -> Iterator[Field]:
    """What may be replaced: not annotations, docstrings, messages or the ``strict`` of a zip."""
    for name, value in ast.iter_fields(tree):
        for place, child in enumerate(value if isinstance(value, list) else [value]):
            match child:
                case ast.Expr(value=ast.Constant()) | ast.JoinedStr() | ast.keyword(arg="strict"):
                    continue
                case ast.Subscript(value=ast.Name("Literal")):
                    continue
                case ast.AST() if name not in ("annotation", "returns"):
                    yield tree, name, place if isinstance(value, list) else None
                    if not isinstance(child, ast.Raise):
                        yield from fields(child)


def common(a: str, b: str) -> int:
    """Letters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def named(before: list[str], after: list[str]) -> str:
    """``function: old -> new`` of two texts that differ in one place."""
    first = next(n for n, line in enumerate(before) if line != after[n])
    old, new = before[first], after[first]
    inside = "module"
    for line in reversed(before[: first + 1]):
        if old.startswith((" ", "def ")) and (found := DEFINITION.match(line)):
            inside = found[1]
            break
    start = max(common(old, new) - AROUND, 0)
    end = max(common(old[::-1], new[::-1]) - AROUND, 0)
    old, new = (text[start : len(text) - end].strip() for text in (old, new))
    return f"{inside}: {old} -> {new}"


def mutants(source: str) -> dict[str, str]:
    """Names and texts of the modules that differ from this one in one place."""
    tree = ast.parse(source)
    before = ast.unparse(tree)
    found: dict[str, str] = {}
    for holder, name, place in list(fields(tree)):
        value = getattr(holder, name)
        node = value if place is None else value[place]
        asked = name in ("test", "ifs") or (name == "values" and isinstance(holder, ast.BoolOp))
        condition = asked and not isinstance(node, ast.Tuple)  # `x or ()` is none
        may_go = name in ("keywords", "decorator_list", "lower", "upper")
        always = [ast.Constant(True), ast.Constant(False)] if condition else []
        for new in [*instead(node), *always, *([None] if may_go else [])]:
            many = place is not None and [
                *value[:place],
                *([new] if new else []),
                *value[place + 1 :],
            ]
            setattr(holder, name, new if place is None else many)
            text = ast.unparse(tree)
            if text != before and text not in found.values():
                said = named(before.splitlines(), text.splitlines())
                again = sum(other.split(" #")[0] == said for other in found)
                found[f"{said} #{again + 1}" if again else said] = text
        setattr(holder, name, value)
    return found


class Changed(SourceFileLoader):
    """Imports one module, from another text."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(path.removesuffix(".py").replace("/", "."), path)
        self.text = text

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, _: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


def passes(path: str, text: str, tests: list[str], seconds: int) -> bool:
    """Whether the tests of the module in ``path`` pass with another text, in time."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(seconds)  # the end of the process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.meta_path.insert(0, Changed(path, text))
    options = "-x -q --tb=no -p no:cacheprovider -o timeout=0 --hypothesis-profile=mutants"
    os._exit(int(pytest.main([*options.split(), *tests])))


def check(path: str, listed: dict[str, Any]) -> bool:
    """Try the mutants of a module, say what is left, and whether that is as listed."""
    source = Path(path).read_text()
    known = {name for left in listed.get("left", ()) for name in left["mutants"]}
    start = time.monotonic()
    if not passes(path, ast.unparse(ast.parse(source)), listed["tests"], 600):
        print(f"{path}: {' '.join(listed['tests'])} fail without a change")
        return False
    seconds = 10 + int(5 * (time.monotonic() - start))
    left, unexplained = set(), 0
    texts = mutants(source)
    for name, text in texts.items():
        if passes(path, text, listed["tests"], seconds):
            left.add(name)
            if name not in known:
                unexplained += 1
                print(f"{path}: left: {name}", flush=True)
    gone = sorted(known - left)
    for name in gone:
        print(f"{path}: explained in {LISTED} and not left: {name}")
    print(
        f"{path}: {len(texts)} mutants, {len(texts) - len(left)} killed, {len(left)} left, "
        f"{unexplained} of them not explained",
        flush=True,
    )
    return not unexplained and not gone


def main(paths: list[str]) -> int:
    listed = tomllib.loads(LISTED.read_text())
    sys.path[0] = str(Path.cwd())
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not outlive a fork
    settings.register_profile(  # a failure is enough, the smallest takes time
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
    )
    for name in listed.pop("import", ()):
        importlib.import_module(name)
    gc.freeze()  # what is collected in no child is copied to none
    if unknown := set(paths) - set(listed):
        print(f"{LISTED} names no {', '.join(sorted(unknown))}; it names {', '.join(listed)}")
        return 2
    return 0 if all([check(path, listed[path]) for path in paths or listed]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
