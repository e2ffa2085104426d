"""`jitmla cache explain | verify | gc | pin | unpin | export | import`: output for people and scripts, exit codes."""

import json
import os
import tempfile
import time

import pytest
from typer.testing import CliRunner

from jitmla import bounds, compile, env, models, registry, toolchain
from jitmla.cli import app
from jitmla.compile import Built
from jitmla.store import Store

from .support.keys import KERNELS, SO_BYTES, make_key, publish
from .support.tiny import SOURCE as TINY
from .support.tiny import needs_compiler, tiny_key
from .support.tree import unprivileged

MODEL = ["--model", "deepseek-v3", "--tp", "8", "--arch", "sm_90a"]


def cli(*args):
    return CliRunner().invoke(app, ["cache", *(str(a) for a in args)], catch_exceptions=False, env={"COLUMNS": "200"})


def objects(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def quick(monkeypatch):
    """No waiting for readers."""
    monkeypatch.setattr(bounds, "GRACE", -0.05)


@pytest.fixture(scope="module")
def sources():
    """The Keys of MODEL, with their sources."""
    choices = {choice.key: choice for spec in models.specs_for("deepseek-v3", tp=8, arch="sm_90a")
               for choice in registry.choices(spec)}
    return {key: choice.source() for key, choice in choices.items()}


@pytest.fixture
def model(store, sources):
    """The store with every kernel of MODEL."""
    return {key: store.publish(key, source, SO_BYTES, KERNELS) for key, source in sources.items()}


# -------------------------------------------------------------------------------------------------------- explain


def test_explain_a_model(model, store):
    done = cli("explain", *MODEL)
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == len({key.spec for key in model})
    assert all(line.startswith("stored ") and str(store.root) in line for line in done.stdout.splitlines())
    assert all(o["cached"] for o in objects(cli("explain", *MODEL, "--json")))


def test_explain_a_miss_and_do_what_it_says(model, monkeypatch):
    spec = models.specs_for("deepseek-v3", tp=8, arch="sm_90a", page_sizes=[64], max_s_q=1, dtype="fp16")[0]
    facts = [part for name, value in spec if name not in ("op", "arch")
             for part in ("--spec", f"{name}={str(value).lower()}")]
    asked = ("explain", "--op", "mla_decode", "--arch", "sm_90a", *facts)
    done = cli(*asked)
    assert done.exit_code == 1 and "spec.dtype: fp16 wanted, bf16 stored" in done.stdout
    [found] = objects(cli(*asked, "--json"))
    assert {d["field"] for d in found["nearest"][0]["differs"]} == {"spec.dtype", "spec.kv_dtype"}
    [command] = [line.partition("jitmla ")[2] for line in done.stdout.splitlines() if "to store it" in line]
    monkeypatch.setattr(compile, "build", lambda key, source, **_: Built(SO_BYTES, source, KERNELS, 0.0))
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    done = cli(*asked)
    assert done.exit_code == 0 and "nearest" not in done.stdout


def test_explain_a_model_ends_with_what_stores_the_rest(store, monkeypatch):
    asked = [*MODEL, "--page-size", "64", "--max-s-q", "1", "--uses", "prefill"]
    done = cli("explain", *asked)
    last = done.stdout.splitlines()[-1]
    assert done.exit_code == 1 and last.startswith("to store all that is missing: jitmla prewarm --model deepseek-v3")
    monkeypatch.setattr(compile, "build", lambda key, source, **_: Built(SO_BYTES, source, KERNELS, 0.0))
    assert CliRunner().invoke(app, last.partition("jitmla ")[2].split()).exit_code == 0
    done = cli("explain", *asked)
    assert done.exit_code == 0 and all(line.startswith("stored ") for line in done.stdout.splitlines())


def test_explain_a_model_of_which_something_is_not_served():
    done = cli("explain", "--model", "deepseek-v4-pro", "--arch", "sm_100a")
    assert done.exit_code == 1 and "differs: arch=sm_100a (has sm_90a)" in done.stdout
    listed = objects(cli("explain", "--model", "deepseek-v4-pro", "--arch", "sm_100a", "--json"))
    assert {"error" in o for o in listed} == {True, False}


def test_explain_names_the_layer_and_what_was_passed_over(model, monkeypatch, tmp_path, store):
    os.rename(store.root, tmp_path / "layer")
    monkeypatch.setenv(env.CACHE_PATH.name, str(tmp_path / "layer"))
    assert cli("explain", *MODEL).stdout.count(str(tmp_path / "layer")) == len({key.spec for key in model})
    found = objects(cli("explain", *MODEL, "--json"))
    assert {o["layer"] for o in found} == {str(tmp_path / "layer")} and any(o["passed_over"] for o in found)
    listed = objects(cli("ls", "--json"))
    assert {o["layer"] for o in listed} == {str(tmp_path / "layer")} and len(listed) == len(model)
    assert cli("ls").stdout.startswith(f"no kernels in {store.root}\n\n{tmp_path / 'layer'}\n")


@pytest.mark.parametrize("args", [["--arch", "sm_90a"], ["--op", "mla_decode", "--model", "x", "--arch", "sm_90a"],
                                  ["--model", "nobody", "--arch", "sm_90a"]])
def test_explain_what_makes_no_sense(args):
    assert cli("explain", *args).exit_code == 2


# --------------------------------------------------------------------------------------------------------- verify


def test_verify_reads_every_entry_of_every_layer(store, monkeypatch, tmp_path):
    below = Store(tmp_path / "below")
    entries = [publish(s, make_key(page_size=p)) for s, p in ((store, 16), (store, 32), (below, 64), (below, 128))]
    monkeypatch.setenv(env.CACHE_PATH.name, str(below.root))
    assert [o["status"] for o in objects(cli("verify", "--json"))] == ["ok"] * 4
    assert cli("verify").stdout.splitlines()[-1] == "4 ok"
    (entries[0].path / "kernel.so").write_bytes(b"x")
    (entries[2].path / "manifest.json").write_bytes(b"{}")
    (entries[3].path / "kernel.py").chmod(0o666)
    done = cli("verify", "--json")
    assert done.exit_code == 1
    found = {o["key"]: o for o in objects(done)}
    assert [found[e.key.digest]["status"] for e in entries] == ["corrupt", "ok", "corrupt", "untrusted"]
    assert "bytes" in found[entries[0].key.digest]["reason"] and "others can" in found[entries[3].key.digest]["reason"]
    below.root.chmod(0o777)
    found = objects(cli("verify", "--json"))
    assert [o["status"] for o in found if o["path"] == str(below.root)] == ["untrusted"] and len(found) == 3
    assert "2 corrupt" not in cli("verify").stdout and "1 ok, " in cli("verify").stdout.splitlines()[-1] + ", "


def test_verify_an_empty_cache():
    done = cli("verify")
    assert done.exit_code == 0 and done.stdout == "no entries\n"


@needs_compiler
def test_rebuild_compares_the_bytes_of_a_compile(store):
    """The same Key and toolchain give the same bytes; what else is in its place is told."""
    good, other, foreign = tiny_key(), tiny_key(page_size=16), make_key(toolchain={"cute_dsl": "1.0"})
    made = compile.build(good, TINY)
    store.publish(good, TINY, made.so_bytes, made.kernels)
    store.publish(other, TINY, made.so_bytes + b"\0", made.kernels)
    publish(store, foreign)
    done = cli("verify", "--rebuild", "--json")
    status = {o["key"]: o["status"] for o in objects(done)}
    assert done.exit_code == 1
    assert status == {good.digest: "same", other.digest: "differs", foreign.digest: "skipped"}


def test_rebuild_notices_another_source_and_one_that_does_not_compile(model, store, monkeypatch):
    [first, second, *rest] = model.values()
    for entry, source in ((first, "another source"), (second, second.source)):
        manifest_kernels = entry.manifest["kernels"]
        os.rename(entry.path, store.root / entry.key.digest)
        store.publish(entry.key, source, entry.so_bytes, manifest_kernels)

    def build(key, source, **options):
        if key == second.key:
            raise compile.CompileFailed("to compile", differs="no more")
        return Built(SO_BYTES, source, KERNELS, 0.0)

    monkeypatch.setattr(compile, "build", build)
    found = {o["key"]: o for o in objects(cli("verify", "--rebuild", "--json"))}
    assert "another source" in found[first.key.digest]["reason"]
    assert "does not compile: no more" in found[second.key.digest]["reason"]
    assert {found[entry.key.digest]["status"] for entry in rest} == {"same"}


def test_rebuild_of_a_template_that_is_gone_takes_the_stored_source(store, monkeypatch, key):
    made = publish(store, key)
    monkeypatch.setattr(toolchain, "current", lambda options="": key.toolchain)
    monkeypatch.setattr(registry, "each_template", lambda op: ())
    sources = []
    monkeypatch.setattr(compile, "build", lambda key, source: sources.append(source) or Built(SO_BYTES, "", KERNELS, 0))
    [found] = objects(cli("verify", "--rebuild", "--json"))
    assert found["status"] == "same" and sources == [made.source]


def test_rebuild_without_a_compiler(store, monkeypatch, key):
    publish(store, key)
    monkeypatch.setattr(toolchain, "current", lambda options="": None)
    done = cli("verify", "--rebuild", "--json")
    assert done.exit_code == 0 and objects(done)[0]["status"] == "skipped"


# ------------------------------------------------------------------------------------------------- gc, pin, unpin


def test_gc_trims_pins_stay_and_unpinned_go(store, quick):
    keys = [make_key(page_size=page) for page in (16, 32, 64)]
    for age, key in enumerate(keys):
        publish(store, key)
        os.utime(store.root / "v1" / ".used" / key.digest, (time.time() - 9000 + age,) * 2)
    size = sum(r.bytes for r in bounds.residents(store.root))
    assert cli("pin", keys[0].digest[:8]).stdout == f"pinned {keys[0].digest[:12]}\n"
    [done] = objects(cli("gc", "--max-size", f"{size - 1} B", "--json"))
    assert [e["key"] for e in done["evicted"]] == [keys[1].digest] and done["entries"] == 2
    done = cli("gc", "--max-size", "0")
    assert f"evicted {keys[2].digest[:12]}" in done.stdout and "1 entries" in done.stdout
    assert "pinned entries stay" in done.stderr and done.exit_code == 0
    assert os.listdir(store.root / "v1" / ".staging") == []
    assert cli("unpin", "--all").stdout == f"unpinned {keys[0].digest[:12]}\n"
    cli("gc", "--max-size", "0")
    assert list(store.entries()) == []


@pytest.mark.parametrize("args", [["gc", "--max-size", "much"], ["unpin"], ["unpin", "00", "--all"], ["pin", "0000"]])
def test_what_makes_no_sense(args):
    assert cli(*args).exit_code == 2


def test_what_a_layer_holds_cannot_be_pinned(key, tmp_path, monkeypatch):
    publish(Store(tmp_path / "layer"), key)
    monkeypatch.setenv(env.CACHE_PATH.name, str(tmp_path / "layer"))
    done = cli("pin", key.digest[:8])
    assert done.exit_code == 2 and "read-only layer" in done.stderr


def test_gc_waits_for_readers_before_it_deletes(store, key, monkeypatch):
    publish(store, key)
    slept, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or sleep(seconds))
    start = time.monotonic()
    assert cli("gc", "--max-size", "0").exit_code == 0
    assert time.monotonic() - start >= bounds.GRACE and os.listdir(store.root / "v1" / ".staging") == []
    assert slept and not slept.clear()
    assert cli("gc", "--max-size", "0").exit_code == 0
    assert slept == []


def test_prewarm_pins_what_it_was_asked_for(store, monkeypatch):
    monkeypatch.setattr(compile, "build", lambda key, source, **_: Built(SO_BYTES, source, KERNELS, 0.0))
    assert CliRunner().invoke(app, ["prewarm", *MODEL, "--page-size", "64"]).exit_code == 0
    there = bounds.residents(store.root)
    assert there and all(resident.pinned for resident in there)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_prewarm_finds_what_is_in_a_cache_that_it_cannot_write(monkeypatch, seen, sources):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv(env.CACHE_DIR.name, os.path.join(folder, "cache"))
        for key, source in sources.items():
            Store().publish(key, source, SO_BYTES, KERNELS)
        Store().root.chmod(0o755)
        with unprivileged():
            done = CliRunner().invoke(app, ["prewarm", *MODEL, "--json"])
        assert done.exit_code == 0 and {o["status"] for o in objects(done)} == {"hit"}
        assert {e.fields["what"] for e in seen if e.kind == "degrade"} == {"pin"}


# ------------------------------------------------------------------------------------------------ export, import


def test_export_and_import(model, tmp_path, monkeypatch):
    publish(Store(), make_key(arch="sm_100a"))
    [done] = objects(cli("export", tmp_path / "all", "--json"))
    assert len(done["keys"]) == len(model) + 1 and done["bytes"] == (tmp_path / "all").stat().st_size
    [done] = objects(cli("export", tmp_path / "some", "--arch", "sm_90a", "--json"))
    assert set(done["keys"]) == {key.digest for key in model}
    [done] = objects(cli("export", tmp_path / "one", *MODEL, "--page-size", "64", "--max-s-q", "1", "--json"))
    assert len(done["keys"]) == 1
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "new"))
    assert cli("import", tmp_path / "one", "--sha256", done["sha256"]).stdout == (
        f"1 imported in {tmp_path / 'new'}\n")
    assert {o["status"] for o in objects(cli("import", tmp_path / "one", "--json"))} == {"there"}
    assert cli("import", tmp_path / "all").stdout.startswith(f"{len(model)} imported, 1 there in ")
    assert cli("verify").exit_code == 0


def test_export_of_what_is_not_stored(model, tmp_path):
    for args in (["--model", "deepseek-v3", "--arch", "sm_90a", "--dtype", "fp16"], ["--arch", "sm_80"]):
        done = cli("export", tmp_path / "x", *args)
        assert done.exit_code == 2 and not (tmp_path / "x").exists()
    assert "jitmla prewarm --model deepseek-v3 --tp 1 --arch sm_90a" in cli(
        "export", tmp_path / "x", "--model", "deepseek-v3", "--arch", "sm_90a", "--dtype", "fp16").stderr
    assert cli("export", tmp_path / "x", "--model", "deepseek-v3").exit_code == 2
    assert cli("export", tmp_path / "none" / "x").exit_code == 2


def test_a_corrupt_entry_is_not_exported(store, key, tmp_path):
    (publish(store, key).path / "kernel.so").write_bytes(b"x")
    done = cli("export", tmp_path / "x")
    assert done.exit_code == 1 and "jitmla cache verify" in done.stderr and not (tmp_path / "x").exists()


def test_export_takes_from_every_layer(store, tmp_path, monkeypatch):
    for place, page in ((store, 16), (Store(tmp_path / "layer"), 16), (Store(tmp_path / "layer"), 32)):
        publish(place, make_key(page_size=page))
    monkeypatch.setenv(env.CACHE_PATH.name, str(tmp_path / "layer"))
    [done] = objects(cli("export", tmp_path / "x", "--json"))
    assert len(done["keys"]) == 2


def test_import_of_a_damaged_file(model, tmp_path, monkeypatch):
    cli("export", tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "new"))
    done = cli("import", tmp_path / "x")
    assert done.exit_code == 1 and "nothing of it was stored" in done.stderr and not (tmp_path / "new").exists()
    publish(Store(), next(iter(model)), so_bytes=b"mine")
    (tmp_path / "x").write_bytes(data)
    assert "is there with other bytes, and was kept" in cli("import", tmp_path / "x").stderr
