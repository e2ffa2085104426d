"""Rendering: a pure function from template and constants to source, and the sources that the shipped templates give."""

import ast
import copy
import difflib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitmla import registry
from jitmla.errors import InvalidTemplate
from jitmla.registry import read_common
from jitmla.render import BEGIN, END, constants_of, digest, inline, render

from .golden import FOLDER, files, normalised
from .keysets import covering_choices, every_choice

DETERMINED = settings(deadline=None, derandomize=True, database=None)
TEMPLATE = f'''"""A template."""
import first
{BEGIN}
DTYPE = "bf16"
STAGES = 2
CAUSAL = False
SCALE = 0.5
{END}
from common.tools import double, triple
import last


def entry():
    return double(STAGES)
'''
COMMON = {
    "tools": '"""Tools."""\nfrom common.base import one\n\n\ndef double(x):\n    return 2 * x * one()\n',
    "base": "def one():\n    return 1\n",
}
CONSTANTS = {"DTYPE": "fp16", "STAGES": 3, "CAUSAL": True, "SCALE": 2.0}


def namespace(source):
    """What a rendered source defines, imports aside."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import)]
    found = {}
    exec(compile(tree, "rendered", "exec"), found)
    return found


# ------------------------------------------------------------------------------------------------- the function


def test_a_rendered_source():
    text = render(TEMPLATE, CONSTANTS, COMMON.__getitem__, header="jitmla kernel x\nKey y")
    assert text == f'''# jitmla kernel x
# Key y
"""A template."""
import first
{BEGIN}
DTYPE = 'fp16'
STAGES = 3
CAUSAL = True
SCALE = 2.0
{END}
# ============================== common/tools.py
"""Tools."""
# ============================== common/base.py
def one():
    return 1
# ============================== end of common/base.py


def double(x):
    return 2 * x * one()
# ============================== end of common/tools.py
import last


def entry():
    return double(STAGES)
'''
    assert namespace(text)["entry"]() == 6


@DETERMINED
@given(st.fixed_dictionaries({"DTYPE": st.text(), "STAGES": st.integers(), "CAUSAL": st.booleans(),
                              "SCALE": st.floats(allow_nan=False, allow_infinity=False)}))
def test_constants_come_back(constants):
    """Whatever their values, quotes, backslashes and newlines included."""
    before = copy.deepcopy(constants)
    text = render(TEMPLATE, constants, COMMON.__getitem__)
    assert constants_of(text) == before == constants
    found = namespace(text)
    assert all(type(found[n]) is type(v) and found[n] == v for n, v in constants.items())
    assert render(TEMPLATE, dict(reversed(constants.items())), COMMON.__getitem__) == text


def test_rendering_with_the_checked_in_constants_changes_nothing_else():
    """A template compiles as it stands: the only differences are the inlined modules."""
    text = render(TEMPLATE, constants_of(TEMPLATE), COMMON.__getitem__)
    changed = [line for line in difflib.ndiff(TEMPLATE.splitlines(), text.splitlines()) if line[0] == "-"]
    assert changed == ['- DTYPE = "bf16"', "- from common.tools import double, triple"]  # quotes, and the import


@pytest.mark.parametrize("change, differs", [
    ({"STAGES": 2.0}, "STAGES"), ({"STAGES": True}, "STAGES"), ({"CAUSAL": 1}, "CAUSAL"), ({"DTYPE": None}, "DTYPE"),
    ({"EXTRA": 1}, "EXTRA"), ({"stages": 2}, "stages")])
def test_constants_of_other_names_or_types(change, differs):
    with pytest.raises(InvalidTemplate) as caught:
        render(TEMPLATE, {**CONSTANTS, **change}, COMMON.__getitem__, name="mine")
    assert caught.value.differs == differs and "mine" in caught.value.asked


def test_a_missing_constant():
    with pytest.raises(InvalidTemplate) as caught:
        render(TEMPLATE, {k: v for k, v in CONSTANTS.items() if k != "SCALE"}, COMMON.__getitem__)
    assert caught.value.differs == "SCALE"


@pytest.mark.parametrize("source", [
    "x = 1\n", f"{BEGIN}\nA = 1\n", f"A = 1\n{END}\n", f"{END}\nA = 1\n{BEGIN}\n",
    f"{BEGIN}\nA = 1\n{END}\n{BEGIN}\nB = 1\n{END}\n"])
def test_not_exactly_one_block(source):
    with pytest.raises(InvalidTemplate, match="mine") as caught:
        render(source, {"A": 1}, COMMON.__getitem__, name="mine")
    assert "one block between" in caught.value.supported


@pytest.mark.parametrize("line", ["A: int = 1", "A = B = 1", "A, B = 1, 2", "def f(): pass", "print(1)", "x.y = 1",
                                  "A = f(1)", "A = B", "A = [1, 2][0]"])
def test_only_plain_assignments_in_the_block(line):
    source = f"# one\n{BEGIN}\nOK = 1\n{line}\n{END}\n"
    with pytest.raises(InvalidTemplate) as caught:
        constants_of(source, "mine")
    assert caught.value.asked == "line 4 of mine" and "NAME = literal" in caught.value.supported


# ------------------------------------------------------------------------------------------------- inlining


def test_each_module_once():
    source = "from common.base import one\nfrom common.tools import double\nfrom common.base import one\n"
    text = inline(source, COMMON.__getitem__)
    assert text.count("def one") == text.count("def double") == 1
    assert text.index("def one") < text.index("def double") and "from common" not in text


def test_an_import_over_several_lines():
    text = inline("from common.base import (\n    one,\n)\nx = one()\n", COMMON.__getitem__)
    assert "from common" not in text and text.endswith("x = one()\n") and ")\n#" not in text
    assert namespace(text)["x"] == 1


def test_renaming_is_refused():
    with pytest.raises(InvalidTemplate, match="line 2 of mine") as caught:
        inline("import x\nfrom common.base import one as uno\n", COMMON.__getitem__, "mine")
    assert "renamed" in caught.value.differs


@pytest.mark.parametrize("definition", ["def one(): pass", "class one: pass", "one = 3", "one, two = 3, 4"])
def test_one_name_in_two_files(definition):
    with pytest.raises(InvalidTemplate) as caught:
        inline(f"from common.base import one\n{definition}\n", COMMON.__getitem__, "mine")
    assert "'one' in " in caught.value.asked and {"mine", "common/base.py"} == {
        caught.value.differs.split()[0], caught.value.asked.split()[-1]}


def test_one_name_in_two_common_modules():
    modules = {"a": "def f(): pass\n", "b": "f = 3\n"}
    with pytest.raises(InvalidTemplate, match="'f' in common/b.py"):
        inline("from common.a import f\nfrom common.b import f\n", modules.__getitem__)


def test_a_common_module_that_does_not_exist():
    with pytest.raises(InvalidTemplate, match=r"from common\.nothing import"):
        inline("from common.nothing import x\n", read_common)


# ------------------------------------------------------------------------------------------------- the digest


def test_the_digest_covers_all_code_but_the_values_of_constants():
    def of(source=TEMPLATE, **common):
        return digest(source, {**COMMON, **common}.__getitem__)

    assert of() == of(TEMPLATE.replace("STAGES = 2", "STAGES = 7"))
    others = [of(TEMPLATE.replace("import last", "import lust")), of(TEMPLATE.replace("A template", "The template")),
              of(base=COMMON["base"].replace("1", "2")), of(tools=COMMON["tools"].replace("2 *", "3 *"))]
    assert len({of(), *others}) == 5


def test_the_digest_covers_what_common_modules_import():
    """The scan that the digest relies on, and the parser that rendering relies on, find the same imports."""
    source = f"from common.tools import (\n    double)\n{BEGIN}\nA = 1\n{END}\nfrom common.base import one\n"
    read = []

    def reader(name):
        read.append(name)
        return COMMON[name]

    digest(source, reader)
    scanned = list(read)
    read.clear()
    inline(source, reader)
    assert sorted(scanned) == sorted(read) == ["base", "tools"]


@pytest.mark.parametrize("line", [
    "from  common.base import one", "from common .base import one", "x = 1; from common.base import one",
    '"""\nfrom common.base import one\n"""'])
def test_an_import_that_the_scan_and_the_parser_see_differently(line):
    with pytest.raises(InvalidTemplate, match="mine") as caught:
        inline(f"import x\n{line}\n", COMMON.__getitem__, "mine")
    assert "at the beginning of a line" in caught.value.supported


# ------------------------------------------------------------------------------------------------- shipped templates


@pytest.mark.parametrize("name", files())
def test_goldens(name):
    """After a change that is meant: `python -m tests.golden`, and read what git diff shows."""
    stored = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    diff = list(difflib.unified_diff(stored, files()[name].splitlines(), "stored", "now", lineterm="", n=1))
    assert not diff, "generated code changed (python -m tests.golden writes it again):\n" + "\n".join(diff[:80])


def test_no_other_goldens():
    assert {p.name for p in FOLDER.glob("*.txt")} == set(files())


def test_normalised_text_is_the_same_code():
    source = '"""Doc."""\nx = "# no comment"  # a comment\n\n\ndef f():\n    """Doc\n    # string."""\n    return x\n'
    assert normalised(source) == 'x = "# no comment"\ndef f():\n    return x\n'


@pytest.mark.parametrize("choice", covering_choices(), ids=lambda c: f"{c.variant.name} {c.spec}")
def test_every_rendered_file(choice):
    text = choice.source()
    tree = ast.parse(text)
    assert "from common" not in text and "import common" not in text
    assert constants_of(text) == dict(choice.key.constants)
    head = text.splitlines()[:3]
    assert head == [f"# jitmla kernel {choice.key.name} for {choice.spec.arch}", f"# Key {choice.key.digest}",
                    f"# template {choice.template.digest}"]
    assert ast.get_docstring(tree), "the template's docstring stays the module's docstring"
    defined = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert len(defined) == len(set(defined)) and "entry" in defined
    assert choice.source() == text


def _tiled(choice):
    tiles = choice.template.name in ("sm90_trio", "sm90_relay", "sm90_swap")
    return tiles and choice.spec["rows"] != dict(choice.key.constants)["ROWS"]


def test_every_source_is_another_one():
    """Keys that differ have sources or archs that differ: no Key is compiled for nothing. But for row tiles, which
    serve several ranges of query rows."""
    choices = [c for c in every_choice() if not _tiled(c)]
    assert len({c.key.digest for c in choices}) == len({
        (c.template.name, c.spec.arch, c.key.constants, *_rows(c)) for c in choices})
    some = [c for c in covering_choices() if not _tiled(c)]
    # without the header, which names the Key
    assert len({(c.source().split("\n", 3)[3], c.spec.arch, *_rows(c)) for c in some}) == len(some)


def _rows(choice):
    """`rows` picks a row of the config table; a tile of these templates serves several buckets of it."""
    return (choice.spec["rows"],) if choice.template.name in ("portable", "sm90_fp8") else ()


@pytest.mark.parametrize("module", sorted(p.stem for p in (registry.TEMPLATES / "common").glob("*.py")))
def test_common_modules_read_no_constant_of_a_template(module):
    """They take parameters instead: they are shared by templates whose constants differ."""
    constants = set().union(*(constants_of(t.source) for op in registry.ops() for t in registry.templates(op)))
    tree = ast.parse(read_common(module))
    own = {n.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets for n in ast.walk(t)
           if isinstance(n, ast.Name)}
    own |= {a.arg for node in ast.walk(tree) if isinstance(node, ast.arguments)
            for a in [*node.posonlyargs, *node.args, *node.kwonlyargs]}
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert not (read - own) & constants
