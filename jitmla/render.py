"""Template text + constants -> the source that is compiled. A pure function of its arguments.

Rendering does three things: it replaces the marked block of constants, puts the text of the `common` modules that the
template imports in the place of those imports, and writes a header. Nothing else is generated.
"""

from __future__ import annotations

import ast
import hashlib
import threading
from collections.abc import Callable
from typing import Any

from .errors import InvalidTemplate

BEGIN = "# --- constants: replaced when rendered ---"
END = "# --- end of constants ---"
COMMON = "common."
IMPORT = f"from {COMMON}"
_parser = threading.Lock()


def constants_of(source: str, name: str = "template") -> dict[str, Any]:
    """The checked-in constants: a working point of the template."""
    head, block, _ = _cut(source, name)
    constants: dict[str, Any] = {}
    for node in _parse(block, name).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise _not_a_constant(head, node, name)
        try:
            constants[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError as e:
            raise _not_a_constant(head, node, name) from e
    return constants


def _not_a_constant(head: str, node: ast.stmt, name: str) -> InvalidTemplate:
    # the block begins with the end of the line that has the first mark
    return InvalidTemplate(f"line {head.count(chr(10)) + node.lineno} of {name}",
                           supported="NAME = literal between the constants marks", differs=ast.unparse(node),
                           remedy="compute it behind the block")


def inline(source: str, read_common: Callable[[str], str], name: str = "template") -> str:
    """`source` with each `from common.X import ...` replaced, once and recursively, by the text of common module X."""
    return _inline(source, read_common, name, set(), {})


def digest(source: str, read_common: Callable[[str], str], name: str = "template") -> str:
    """sha256 of all the code of a template: its text without the values of the constants, and the common modules that
    it names, directly or through each other.

    Every first use of a kernel in a process needs the digest, so nothing is parsed (12 ms) but the imports are found by
    a scan; `inline` refuses a source whose imports are not those that the scan finds.
    """
    head, _, tail = _cut(source, name)
    texts, modules = [head, tail], list(dict.fromkeys(_scan(source)))
    for module in modules:  # grows while it is read
        texts += [module, read_common(module)]
        modules += [m for m in dict.fromkeys(_scan(texts[-1])) if m not in modules]
    total = hashlib.sha256()
    for data in (text.encode() for text in texts):
        total.update(b"%d\n%b" % (len(data), data))
    return total.hexdigest()


def render(source: str, constants: dict[str, Any], read_common: Callable[[str], str], *, header: str = "",
           name: str = "template") -> str:
    """The source to compile. `constants` must name exactly the constants of the block, with values of their types."""
    declared = constants_of(source, name)
    wrong = [n for n in sorted(declared.keys() | constants.keys())
             if n not in declared or n not in constants or type(declared[n]) is not type(constants[n])]
    if wrong:
        raise InvalidTemplate(f"constants {constants} for {name}", supported=str(declared), differs=", ".join(wrong),
                              remedy="give exactly these names, with values of these types (see the card)")
    head, _, tail = _cut(inline(source, read_common, name), name)
    block = "".join(f"{n} = {constants[n]!r}\n" for n in declared)
    top = "".join(f"# {line}\n" for line in header.splitlines())
    return f"{top}{head}{BEGIN}\n{block}{END}{tail}"


def _parse(source: str, name: str) -> ast.Module:
    # one thread at a time: before 3.11.8 and 3.12.1, threads that parse at once get a SystemError (CPython gh-106905)
    with _parser:
        return ast.parse(source, filename=name)


def _scan(source: str) -> list[str]:
    """The common modules that lines of `source` import, in order. (A regular expression takes 100 times longer.)"""
    found, at = [], source.find(IMPORT)
    while at >= 0:
        if at == 0 or source[at - 1] == "\n":
            found.append(source[at + len(IMPORT):source.find("\n", at)].partition(" ")[0])
        at = source.find(IMPORT, at + 1)
    return found


def _cut(source: str, name: str) -> tuple[str, str, str]:
    if source.count(BEGIN) != 1 or source.count(END) != 1 or source.index(BEGIN) > source.index(END):
        raise InvalidTemplate(name, supported=f"one block between {BEGIN!r} and {END!r}", differs="no such block",
                              remedy="put both marks into the template, each once")
    head, rest = source.split(BEGIN)
    block, tail = rest.split(END)
    return head, block, tail


def _inline(source: str, read_common: Callable[[str], str], name: str, seen: set[str], owners: dict[str, str]) -> str:
    tree = _parse(source, name)
    lines = source.splitlines(keepends=True)
    _claim(tree, name, owners)
    pieces, position = [], 0
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(COMMON)]
    if [str(n.module).removeprefix(COMMON) for n in imports] != _scan(source):
        raise InvalidTemplate(name, supported="from common.X import ..., each at the beginning of a line of code",
                              differs="a line that is not such an import looks like one, or the other way round",
                              remedy="move the import to the beginning of a line of its own")
    for node in imports:
        if any(alias.asname for alias in node.names):
            raise InvalidTemplate(f"line {node.lineno} of {name}", supported="from common.X import a, b",
                                  differs="inlined names cannot be renamed", remedy="import it under its own name")
        module = str(node.module).removeprefix(COMMON)
        pieces.append("".join(lines[position:node.lineno - 1]))
        if module not in seen:
            seen.add(module)
            text = _inline(read_common(module), read_common, f"common/{module}.py", seen, owners)
            pieces.append(f"# {'=' * 30} common/{module}.py\n{text.rstrip()}\n# {'=' * 30} end of common/{module}.py\n")
        position = int(node.end_lineno or node.lineno)
    return "".join(pieces) + "".join(lines[position:])


def _claim(tree: ast.Module, name: str, owners: dict[str, str]) -> None:
    """All inlined names share one namespace: refuse two definitions of one name in different files."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined = [node.name]
        elif isinstance(node, ast.Assign):
            defined = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        for item in defined:
            if owners.setdefault(item, name) != name:
                raise InvalidTemplate(f"{item!r} in {name}", supported="one definition of each name in all files",
                                      differs=f"{owners[item]} defines it as well", remedy="rename one of the two")
