"""The docs say what is: generated pages are current, every command exists, every error has its section."""

import inspect
import pkgutil
import re
import runpy
import subprocess

import pytest
import typer
from typer.testing import CliRunner

from jitmla import errors, registry
from jitmla.cli import app
from jitmla.compile import Built
from jitmla.spec import mla_decode_spec

from .conftest import REPOSITORY
from .support.keys import KERNELS, SO_BYTES

PAGES = sorted(p for folder in ("", "docs", "docs/benchmarks", "docs/notes", "examples", "jitmla/tunings", "templates")
               for p in (REPOSITORY / folder).glob("*.md"))
TEXTS = {str(page.relative_to(REPOSITORY)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [(page, block) for page, text in TEXTS.items() for block in re.findall(r"```console\n(.*?)```", text, re.S)]
COMMANDS = [(page, line[2:]) for page, block in BLOCKS for line in block.splitlines() if line.startswith("$ ")]


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))


def click_commands():
    """Every command that `jitmla` has: {("cache", "ls"): its click command, ...}."""
    def walk(command, path):
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name))
    return dict(walk(typer.main.get_command(app), ()))


def test_generated_pages_are_current():
    for path, text in runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: run `make docs`"


def test_every_error_has_its_section_and_every_section_its_error():
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)
               and issubclass(value, errors.JitmlaError) and value is not errors.JitmlaError}
    headings = set(re.findall(r"^## (\w+)$", TEXTS["docs/troubleshooting.md"], re.M))
    assert headings == classes


def test_there_are_commands_to_check():
    """Guards the extraction below: the ones a newcomer needs first are among them."""
    found = {command for _, command in COMMANDS}
    assert {"make demo", "make test", "jitmla doctor", "jitmla kernels", "jitmla cache ls"} <= found


@pytest.mark.parametrize("page, command", COMMANDS)
def test_documented_command(page, command, monkeypatch, tmp_path):
    """jitmla commands run (with a compiler that takes no time); what the others name must exist."""
    monkeypatch.chdir(tmp_path)  # commands write files
    monkeypatch.setattr("jitmla.compile.build", lambda key, source, **_: Built(SO_BYTES, source, KERNELS, 0.0))
    program, *args = command.split()
    if program == "jitmla":
        done = CliRunner().invoke(app, args, catch_exceptions=False)
        # doctor fails on a machine that cannot compile; this cache is empty, and what `cache show` names is made up
        allowed = {"doctor": {0, 1}, "cache show": {0, 2}, "cache export": {0, 2}, "cache import": {0, 2},
                   "cache explain": {0, 1}}
        allowed = allowed.get(" ".join(args[:2]), allowed.get(args[0], {0}))
        assert done.exit_code in allowed, done.output
        assert "Usage:" not in done.output
    elif program == "make":
        targets = [arg for arg in args if "=" not in arg]
        assert targets and set(targets) <= make_targets()
    elif program == "pip":
        extra = re.fullmatch(r"install -e '\.\[(\w+)\]'", " ".join(args)).group(1)
        assert re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), re.M)
    elif program in (".venv/bin/python", "python"):
        assert (REPOSITORY / args[0]).is_file()
    elif program == "chmod":
        assert "$(jitmla cache path)" in command
    elif program == "git":
        assert args[0] == "clone"
    else:
        raise AssertionError(f"{page} documents {command!r}, which no test knows how to check")


@pytest.mark.parametrize("name", [*TEXTS, "jitmla"])
def test_commands_named_in_the_text_exist(name):
    """`jitmla X`, `make X` and options, between backticks anywhere; in the sources of the package as well."""
    if name == "jitmla":
        text = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "jitmla").rglob("*.py"))
    else:
        text = TEXTS[name]
    known = click_commands()
    for mention in re.findall(r"`jitmla ([a-z][^`]*)`", text):
        words = mention.split()
        path = tuple(words[:2]) if tuple(words[:2]) in known else (words[0],)
        assert path in known, f"`jitmla {mention}`"
        if path != ("bench",):  # its arguments are read by another parser
            options = {option for param in known[path].params for option in param.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= options, f"`jitmla {mention}`"
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in make_targets(), f"`make {target}`"


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "-s", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([a-z-]+) ", listed, re.M)) == make_targets()


def test_ci_runs_the_tests():
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert (REPOSITORY / ".ci" / "run").stat().st_mode & 0o111 and re.search(r"^exec make test$", script, re.M)


def test_every_page_is_looked_at():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    assert set(listed.stdout.split()) <= set(TEXTS)


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_paths(name):
    """Relative links lead to a file, and to a heading of it where they name one; paths of the repository between
    backticks exist."""
    here = (REPOSITORY / name).parent
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        page = here / path if path else REPOSITORY / name
        assert page.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link
    for path in re.findall(r"`((?:jitmla|templates|tests|docs|examples)/[\w./-]+)`", TEXTS[name]):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "```python" in text])
def test_python_in_the_docs_runs(name):
    for block in re.findall(r"```python\n(.*?)```", TEXTS[name], re.S):
        program = block.replace('"cuda" if torch.cuda.is_available() else "cpu"', '"cpu"')
        names = {}
        exec(compile(program, name, "exec"), names)
        if "jitmla.mla_decode(" in program:
            assert names["out"].shape == (2, 1, 16, 512) and names["lse"].isfinite().all()
        if "jitmla.o_a_proj(" in program:
            assert names["z"].shape == (5, 2, 1024) and names["z"].isfinite().all()


@pytest.mark.parametrize("name", TEXTS)
def test_python_names_in_the_text_exist(name):
    """What is called `jitmla.something` between backticks can be had under that name."""
    for dotted in set(re.findall(r"`(jitmla(?:\.\w+)+)[`(]", TEXTS[name])):
        assert pkgutil.resolve_name(dotted) is not None, dotted


def test_the_calls_of_other_libraries_are_listed():
    """All of them, each with the parameters that it has."""
    rows = {cells[2].strip(" `"): cells[3] for line in TEXTS["docs/coming_from.md"].splitlines()
            if len(cells := line.strip("|").split("|")) == 4}
    compat = REPOSITORY / "jitmla" / "compat"
    modules = [pkgutil.resolve_name(f"jitmla.compat.{path.stem}") for path in compat.glob("[a-z]*.py")]
    calls = {f"{module.__name__}.{call}" for module in modules for call in getattr(module, "__all__", ())}
    assert calls == {name for name in rows if name.startswith("jitmla.compat.")}
    for name in calls:
        missing = [p for p in inspect.signature(pkgutil.resolve_name(name)).parameters if p not in rows[name]]
        assert not missing, f"{name}: {missing}"


def test_the_matrix_names_every_template():
    for op in registry.ops():
        for template in registry.templates(op):
            assert f"| {template.name} |" in TEXTS["docs/kernels.md"]


def test_the_card_in_the_docs_is_a_card(card_of_x):
    """Its example is read by the same code as a real card."""
    text = TEXTS["docs/templates.md"].split("## The card")[1].split("## The source")[0]
    card_of_x("\n".join(line[4:] for line in text.splitlines() if line.startswith("    ")))
    template = registry.templates("x")[0]
    assert template.variants[0].when and template.options == "" and template.equal


def test_the_rings_name_every_module():
    table = TEXTS["docs/architecture.md"].split("## Three rings")[1].split("## From a call")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if re.match(r"\| \d", line)]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    modules = {path.stem for path in (REPOSITORY / "jitmla").iterdir()
               if path.suffix == ".py" or (path / "__init__.py").is_file()} - {"__init__", "__main__"}
    assert sorted(named) == sorted(modules)


def test_who_serves_the_features_of_mla_decode_on_hopper():
    """The table of docs/engines.md, by the cards."""
    features = {
        "any page size from 1 to 128": [{"page_size": n} for n in (1, 7, 16, 32, 64, 100, 128)],
        "a slot cache": [{"page_size": 8192}], "latent and rope part in two tensors": [{"split_cache": True}],
        "e4m3 cache, bf16 or fp16 queries": [{"kv_dtype": "e4m3"}, {"kv_dtype": "e4m3", "dtype": "fp16"}],
        "e4m3 cache and queries": [{"dtype": "e4m3"}],
        "requests with different numbers of query tokens": [{"compact": True}],
        "the same bits for a request, whatever else is in the batch": [{"batch_invariant": True}]}
    rows = re.findall(r"^\| (.+?) \| .+? \| `(\w+)` \|$", TEXTS["docs/engines.md"], re.M)
    assert [what for what, _ in rows] == list(features)
    usual = dict(arch="sm_90a", dtype="bf16", kv_lora_rank=512, qk_rope_head_dim=64, page_size=64, s_q=2, heads=16,
                 causal=True)
    for what, backend in rows:
        for different in features[what]:
            assert registry.choose(mla_decode_spec(**usual | different)).template.backend == backend, (what, different)
