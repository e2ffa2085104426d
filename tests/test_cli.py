"""The command: what it prints for people and for scripts, its exit codes, and that it stops when it is told to."""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

import jitmla
from jitmla import compile, models, registry, toolchain
from jitmla.cli import app, doctor
from jitmla.compile import Built
from jitmla.errors import CompileFailed
from jitmla.store import Store

from .conftest import REPOSITORY
from .support.keys import KERNELS, SO_BYTES, make_key, publish
from .support.processes import PATIENCE, alive, program, wait_until

SPEC = ["--op", "mla_decode", "--arch", "sm_90a", "--spec", "dtype=bf16", "--spec", "kv_dtype=bf16",
        "--spec", "kv_lora_rank=512", "--spec", "qk_rope_head_dim=64", "--spec", "page_size=64", "--spec", "rows=8",
        "--spec", "causal=false"]
MODEL = ["--model", "deepseek-v3", "--tp", "8", "--arch", "sm_90a"]
H100 = "print('{\"cuda\": \"12.8\", \"devices\": [[\"H100\", 9, 0]]}')"
V100 = "print('{\"cuda\": \"12.8\", \"devices\": [[\"V100\", 7, 0]]}')"
A100 = "print('{\"cuda\": \"12.8\", \"devices\": [[\"A100\", 8, 0]]}')"
CPU_BUILD = "print('{\"cuda\": null, \"devices\": []}')"


def cli(*args):
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False, env={"COLUMNS": "200"})


def process(env, *args, python=("-m", "jitmla")):
    """Run the command as a process of its own."""
    return subprocess.run([sys.executable, *python, *args], env=env, capture_output=True, text=True, timeout=300)


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def builder(monkeypatch):
    """A compiler that takes no time. Fails for Specs whose page size is in `.refuses`; `.most` ran at once."""
    class Fake:
        refuses, most, running, guard = (), 0, 0, threading.Lock()

        def __call__(self, key, source, store=None, timeout=None, run=None):
            with self.guard:
                self.running += 1
                self.most = max(self.most, self.running)
            time.sleep(0.02)
            with self.guard:
                self.running -= 1
            if key.spec["page_size"] in self.refuses:
                raise CompileFailed(f"to compile {key.name}", differs="it is refused", remedy="none")
            return Built(SO_BYTES, source, KERNELS, 0.02)

    fake = Fake()
    monkeypatch.setattr(compile, "build", fake)
    return fake


# ------------------------------------------------------------------------------------------------------- starting


def test_bench_has_its_own_arguments():
    """Whatever follows `bench` is read by jitmla.bench."""
    done = cli("bench", "--help")
    assert done.exit_code == 0 and "mla_decode" in done.stdout
    assert cli("bench", "nothing").exit_code == 2


@pytest.mark.parametrize("args", ["--help", "kernels", "cache ls", "prewarm --model nobody --arch sm_90a"])
def test_nothing_heavy_is_imported(python_env, args):
    program = ("import sys, typer.testing, jitmla.cli\n"
               "typer.testing.CliRunner().invoke(jitmla.cli.app, sys.argv[1:])\n"
               "print([m for m in ('torch', 'tvm_ffi', 'cutlass', 'numpy') if m in sys.modules])")
    done = process(python_env, *args.split(), python=("-c", program))
    assert done.stdout == "[]\n", done.stderr


def test_version_and_both_entry_points(python_env):
    assert process(python_env, "--version").stdout == f"jitmla {jitmla.__version__}\n"
    program = "import sys; from jitmla.cli import main; main()"
    assert process(python_env, "--version", python=("-c", program)).stdout == f"jitmla {jitmla.__version__}\n"


# -------------------------------------------------------------------------------------------------------- kernels


def test_kernels_lists_every_row_of_every_card():
    listed = {(r["op"], r["arch"], r["template"], r["variant"]) for r in objects(cli("kernels", "--json").stdout)}
    cards = {(op, arch, t.name, v.name) for op in registry.ops() for t in registry.templates(op) for arch in t.archs
             for v in t.variants if arch in v.when.get("arch", t.archs)}
    assert listed == cards
    table = cli("kernels").stdout
    assert all(all(part in table for part in row) for row in cards)
    assert all(line == line.rstrip() for line in table.splitlines())


def test_kernels_of_one_op_on_one_arch():
    listed = objects(cli("kernels", "mla_decode", "--arch", "sm_89", "--json").stdout)
    assert {(r["op"], r["arch"], r["backend"]) for r in listed} == {("mla_decode", "sm_89", "portable")}
    names = {v.name for t in registry.templates("mla_decode") for v in t.variants
             if "sm_89" in t.archs and "sm_89" in v.when.get("arch", t.archs)}
    assert {r["variant"] for r in listed} == names
    assert cli("kernels", "fp8_bmm", "--arch", "sm_80", "--json").stdout == ""
    assert cli("kernels", "fp8_bmm", "--arch", "sm_80").stdout == "no kernels of fp8_bmm for sm_80\n"
    for wrong, told in ((["mla_encode"], "no such op"), (["--arch", "sm_90"], "did you mean 'sm_90a'")):
        done = CliRunner().invoke(app, ["kernels", *wrong])
        assert done.exit_code == 2 and told in done.stderr


# -------------------------------------------------------------------------------------------------------- prewarm


def test_one_kernel_from_prewarm_to_show(python_env, store):
    """The real entry point and the real compiler: compiled, found again, listed, shown."""
    cold = process(python_env, "prewarm", *SPEC, "--json")
    assert cold.returncode == 0, cold.stderr
    [first] = objects(cold.stdout)
    assert first["status"] == "compiled" and first["seconds"] > 0.5 and re.fullmatch("[0-9a-f]{64}", first["key"])
    [second] = objects(process(python_env, "prewarm", *SPEC, "--json").stdout)
    assert (second["status"], second["key"], second["spec"]) == ("hit", first["key"], first["spec"])
    assert second["seconds"] < first["seconds"]

    [listed] = objects(cli("cache", "ls", "--json").stdout)
    assert listed["key"] == first["key"] and listed["spec"] == first["spec"] and listed["bytes"] > 10_000
    [shown] = objects(cli("cache", "show", first["key"][:8], "--json").stdout)
    assert shown["manifest"]["digest"] == first["key"]
    [entry] = [store.find(found.key) for found in store.entries()]
    assert cli("cache", "show", first["key"][:8], "--source").stdout.strip() == entry.source.strip()
    assert "def entry()" in entry.source
    page = cli("cache", "show", first["key"][:8]).stdout
    assert shown["source"] in page and all(str(kernel["registers"]) in page for kernel in entry.manifest["kernels"])


def test_prewarm_covers_the_keys_of_the_model(builder):
    done = cli("prewarm", *MODEL, "--jobs", "2", "--json")
    assert done.exit_code == 0
    found = objects(done.stdout)
    assert {o["key"] for o in found} == {key.digest for key in jitmla.keys_for("deepseek-v3", tp=8, arch="sm_90a")}
    assert len(found) == len({o["key"] for o in found}) and {o["status"] for o in found} == {"compiled"}
    assert builder.most == 2
    assert {o["status"] for o in objects(cli("prewarm", *MODEL, "--json").stdout)} == {"hit"}


def test_threads_render_at_once():
    """As the threads of prewarm do. Some versions of Python cannot parse in two threads (CPython gh-106905): there, a
    garbage collection at the wrong moment, which is provoked here, lets another thread in."""
    spec = models.specs_for("deepseek-v3", tp=1, arch="sm_90a", page_sizes=[64], max_s_q=1)[0]
    threshold = gc.get_threshold()
    gc.callbacks.append(lambda phase, info: time.sleep(0))
    gc.set_threshold(200, 1000, 1000)
    try:
        with ThreadPoolExecutor(4) as pool:
            sources = set(pool.map(lambda _: registry.choose(spec).source(), range(40)))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()
    assert len(sources) == 1


def test_prewarm_narrowed_by_options(builder):
    narrowed = ["--page-size", "64", "--page-size", "16", "--max-s-q", "1", "--dtype", "fp16"]
    found = objects(cli("prewarm", *MODEL, *narrowed, "--json").stdout)
    assert sorted((o["spec"]["page_size"], o["spec"]["dtype"]) for o in found) == [(16, "fp16"), (64, "fp16")]


def test_prewarm_reads_a_config(builder, tmp_path):
    config = {"model_type": "mine", "num_attention_heads": 32, "kv_lora_rank": 256, "qk_rope_head_dim": 64,
              "qk_nope_head_dim": 64, "v_head_dim": 128, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = objects(cli("prewarm", "--model", tmp_path, "--arch", "sm_90a", "--json").stdout)
    assert {(o["spec"]["kv_lora_rank"], o["spec"]["dtype"]) for o in found} == {(256, "fp16")}


def test_prewarm_table(builder):
    builder.refuses = (16,)
    done = cli("prewarm", *MODEL, "--max-s-q", "1")
    assert done.exit_code == 1
    assert done.stdout.count("compiled") == 3 + 1 and "3 compiled, 1 failed" in done.stdout
    assert "it is refused" in done.stderr and "Traceback" not in done.stderr


def test_a_failure_leaves_the_others(builder):
    builder.refuses = (64, 128)
    done = cli("prewarm", *MODEL, "--json")
    assert done.exit_code == 1
    found = objects(done.stdout)
    for o in found:
        failed = o["spec"]["page_size"] in builder.refuses
        assert o["status"] == ("failed" if failed else "compiled")
        assert o.get("error") == ("CompileFailed" if failed else None)
    builder.refuses = ()
    compile.forget_failures()  # as in a new process
    assert [o["status"] for o in objects(cli("prewarm", *MODEL, "--json").stdout)].count("failed") == len(found) / 2
    assert cli("cache", "gc", "--failed").exit_code == 0
    compile.forget_failures()
    again = [o["status"] for o in objects(cli("prewarm", *MODEL, "--json").stdout)]
    assert again.count("compiled") == again.count("hit") == len(again) / 2


def test_the_command_in_messages_is_understood(builder):
    """What MissNotAllowed prints compiles the Spec that was missing."""
    from jitmla import dispatch  # imports torch, which the rest of this file does without
    for spec in models.specs_for("deepseek-v3", tp=8, arch="sm_90a", page_sizes=[32]):
        program, *args = dispatch.prewarm_command(spec).split()
        assert program == "jitmla"
        found = objects(cli(*args, "--json").stdout)
        assert len(found) == len(registry.choices(spec))
        assert all(done["spec"] == spec.as_dict() and done["status"] in ("compiled", "hit") for done in found)


def test_a_cache_that_cannot_be_written_fails_before_compiling(builder, monkeypatch):
    monkeypatch.setenv("JITMLA_CACHE_DIR", "/proc/nothing/here")
    done = cli("prewarm", *SPEC, "--json")
    [outcome] = objects(done.stdout)
    assert done.exit_code == 1 and outcome["error"] == "CacheUnwritable" and builder.most == 0


def test_a_machine_without_compiler(builder, monkeypatch):
    """Takes what is there, and says what is missing for the rest."""
    assert cli("prewarm", *MODEL, "--page-size", "64").exit_code == 0
    monkeypatch.setattr(toolchain, "current", lambda options="": None)
    done = cli("prewarm", *MODEL, "--page-size", "64", "--page-size", "32", "--json")
    assert done.exit_code == 1
    by_page = {o["spec"]["page_size"]: o for o in objects(done.stdout)}
    assert by_page[64]["status"] == "hit" and by_page[64]["key"]
    assert by_page[32]["error"] == "ToolchainMissing" and by_page[32]["key"] is None


@pytest.fixture
def hanging(store, tmp_path):
    """A program that runs the command with a compiler that hangs; the file in which that one writes its process; and
    the one Key of MODEL that is in the cache."""
    ready = registry.choose(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", page_sizes=[64], max_s_q=1)[0])
    store.publish(ready.key, ready.source(), SO_BYTES, KERNELS)
    stub, pids = tmp_path / "python", tmp_path / "pids"
    stub.write_text(f"#!/bin/sh\necho $$ >> {pids}\nexec sleep 600\n")
    stub.chmod(0o755)
    yield f"import sys; sys.executable = {str(stub)!r}\nfrom jitmla.cli import main, output\n", pids, ready.key
    for pid in pids.read_text().split() if pids.exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


INTERRUPTED_WHILE_IT_PRINTS = """
import os, signal, time
printed = output.json_line
def json_line(value):
    printed(value)
    while not os.path.exists({pids!r}): time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)
output.json_line = json_line
"""


@pytest.mark.parametrize("when", ["while it waits", "while it prints"])
def test_interrupt_stops_the_compilers_and_keeps_what_is_done(python_env, store, hanging, when):
    program_text, pids, ready = hanging
    if when == "while it prints":
        program_text += INTERRUPTED_WHILE_IT_PRINTS.format(pids=str(pids))
    # as many jobs as Keys: the one that is there does not wait for those that hang
    with program("-c", program_text + "main()", "prewarm", *MODEL, "--jobs", "32", "--json", env=python_env) as command:
        first = command.stdout.readline()
        if when == "while it waits":
            assert wait_until(lambda: pids.exists() and pids.read_text().split())
            command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=PATIENCE)
    assert command.returncode == 130 and "Traceback" not in err
    assert [(o["status"], o["key"]) for o in objects(first + out)] == [("hit", ready.digest)]
    assert wait_until(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))
    assert store.find(ready) is not None


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("args, error", [
    (["prewarm", "--model", "nobody", "--arch", "sm_90a"], "UnknownModel"),
    (["prewarm", "--model", "deepseek-v3", "--arch", "sm_90"], "UnknownArch"),
    (["prewarm", "--model", "deepseek-v3", "--arch", "sm_80"], "NoTemplate"),
    (["prewarm", "--model", "deepseek-v3", "--arch", "sm_90a", "--tp", "3"], "InvalidArgument"),
    (["prewarm", "--model", "deepseek-v3", "--arch", "sm_90a", "--dtype", "fp8"], "InvalidArgument"),
    (["prewarm", *(fact.replace("rank=512", "rank=64") for fact in SPEC)], "NoTemplate"),
    (["prewarm", "--op", "conv", "--arch", "sm_90a"], "InvalidArgument"),
    (["prewarm", *SPEC, "--spec", "rows=7"], "InvalidArgument"),
    (["prewarm", *SPEC, "--spec", "causal=maybe"], "InvalidArgument"),
    (["prewarm", *SPEC, "--spec", "colour=blue"], "InvalidArgument"),
    (["prewarm", *SPEC[:-2]], "InvalidArgument"),
    (["prewarm", *MODEL, "--tunings", "/nothing.json"], "InvalidTunings"),
    (["cache", "show", "abc"], "InvalidArgument"),
])
def test_a_request_that_cannot_be_served(without_portable, args, error):
    """Four parts on stderr, or one object on stdout; exit code 2."""
    done = cli(*args, "--json")
    [problem] = objects(done.stdout)
    assert done.exit_code == 2 and problem["error"] == error and done.stderr == ""
    assert problem["asked"] and problem["differs"]
    told = cli(*args)
    assert told.exit_code == 2 and told.stdout == ""
    for part in ("asked", "supported", "differs", "remedy"):
        assert problem[part] in told.stderr


@pytest.mark.parametrize("args", [
    ["prewarm", "--arch", "sm_90a"], ["prewarm", "--model", "deepseek-v3"],
    ["prewarm", *SPEC, "--model", "deepseek-v3"], ["prewarm", *MODEL, "--spec", "rows=8"],
    ["prewarm", *SPEC, "--page-size", "64"], ["prewarm", *MODEL, "--jobs", "0"],
    ["prewarm", *MODEL, "--page-size", "0"], ["cache", "show"], ["bake"],
])
def test_a_command_line_that_makes_no_sense(args):
    assert cli(*args).exit_code == 2


@pytest.mark.parametrize("args, told", [
    (["prewarm", "--op", "mla_decode", "--arch", "sm_90a", "--spec", "colour=blue"], "no field 'colour'"),
    (["prewarm", "--op", "mla_decode", "--arch", "sm_90a", "--spec", "dtype"], "'dtype' has no value"),
    (["prewarm", "--op", "mla_decode", "--arch", "sm_90a", "--spec", "arch=sm_80"], "no field 'arch' that --spec sets"),
    (["prewarm", "--arch", "sm_90a", "--model", "tests"], "the folder has no config.json"),
    (["tune", "mla_prefill", "--model", "deepseek-v3"], "to tune 'mla_prefill'"),
])
def test_what_was_wrong_with_an_option(args, told, monkeypatch):
    """The option itself, not what follows from it."""
    monkeypatch.chdir(REPOSITORY)
    done = cli(*args)
    assert done.exit_code == 2 and told in done.stderr


def test_errors_of_the_real_process_have_no_traceback(python_env):
    done = process(python_env, "prewarm", "--model", "nobody", "--arch", "sm_90a")
    assert done.returncode == 2 and "to mend it" not in done.stdout and "deepseek-v3" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------- cache


def test_cache_path_needs_no_cache(cache_dir):
    assert cli("cache", "path").stdout.strip() == str(cache_dir) and not cache_dir.exists()
    assert "no kernels" in cli("cache", "ls").stdout and cli("cache", "ls", "--json").stdout == ""


def test_ls_and_show_tell_entries_apart(store):
    keys = [make_key(page_size=page) for page in (16, 32, 64)]
    for key in keys:
        publish(store, key)
    listed = objects(cli("cache", "ls", "--json").stdout)
    assert {o["key"]: o["spec"]["page_size"] for o in listed} == {k.digest: k.spec["page_size"] for k in keys}
    table = cli("cache", "ls").stdout.splitlines()
    assert len(table) == 1 + len(keys)
    for key in keys:
        assert any(key.digest[:12] in row and f"page_size={key.spec['page_size']}" in row for row in table)
    several = cli("cache", "show", "", "--json")
    assert several.exit_code == 2 and "3 entries" in objects(several.stdout)[0]["differs"]


def test_a_corrupt_entry_is_listed_and_not_shown(store, entry):
    manifest = entry.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    [listed] = objects(cli("cache", "ls", "--json").stdout)
    assert listed["key"] == entry.key.digest and listed["fault"]
    assert "corrupt" in cli("cache", "ls").stdout
    for extra in ([], ["--source"]):
        done = cli("cache", "show", entry.key.digest[:6], "--json", *extra)
        assert done.exit_code == 1 and objects(done.stdout)[0]["error"] == "CacheCorrupt"


def test_show_source_verifies_the_source(entry):
    source = entry.path / "kernel.py"
    source.write_text(source.read_text() + "# more\n")
    done = cli("cache", "show", entry.key.digest[:6], "--source")
    assert done.exit_code == 1 and done.stdout == "" and "digests" in done.stderr


def test_a_cache_that_others_can_write(entry, cache_dir):
    cache_dir.chmod(0o777)
    done = cli("cache", "ls", "--json")
    assert done.exit_code == 1 and objects(done.stdout)[0]["error"] == "CacheUntrusted"


# --------------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def machine(monkeypatch):
    """A machine as doctor sees it: so many GPUs, and what the probe of torch prints."""
    def make(gpus, torch_probe, compiler=True):
        monkeypatch.setattr(doctor, "gpu_count", lambda: gpus)
        monkeypatch.setattr(doctor, "TORCH_PROBE", torch_probe)
        monkeypatch.setattr(doctor, "COMPILER_PROBE", "")
        if not compiler:
            monkeypatch.setattr(toolchain, "current", lambda options="": None)
    return make


def diagnosis():
    done = cli("doctor", "--json")
    [report] = objects(done.stdout)
    assert done.exit_code == (0 if report["ok"] else 1)
    assert all(check["remedy"] or check["found"] == "none" for check in report["checks"] if check["stops"])
    return report, {check["name"]: check for check in report["checks"]}


def test_doctor_on_this_machine(python_env):
    """With real probes. The suite compiles, so a compile must be possible."""
    done = process(python_env, "doctor", "--json")
    [report] = objects(done.stdout)
    assert report["compile"] is True, report
    names = {check["name"] for check in report["checks"]}
    assert names >= {"Python", "CuTe DSL", "linker", "cache", "runtime library", "apache-tvm-ffi", "torch", "GPU"}
    assert done.returncode == (0 if report["ok"] else 1)


def test_doctor_without_gpu_asks_for_a_compile(machine):
    machine(0, CPU_BUILD)
    report, _ = diagnosis()
    assert (report["compile"], report["launch"], report["ok"]) == (True, False, True)
    text = cli("doctor").stdout
    assert "compile: possible" in text and "launch:  not possible" in text


@pytest.mark.parametrize("gpus, probe, stopped, word", [
    (1, H100, None, "sm_90a"),
    (1, A100, None, "sm_80: only " + ", ".join(op for op in registry.ops() if any(
        "sm_80" in template.archs for template in registry.templates(op)))),
    (1, V100, "GPU", "compute capability 7.0"), (1, CPU_BUILD, "GPU", "CUDA build"),
    (1, "import nothing_like_it", "torch", "nothing_like_it"),
])
def test_doctor_with_gpu_asks_for_a_launch(machine, gpus, probe, stopped, word):
    machine(gpus, probe)
    report, checks = diagnosis()
    assert report["launch"] is report["ok"] is (stopped is None) and report["compile"] is True
    assert word in json.dumps(checks[stopped or "GPU"])


@pytest.mark.parametrize("prewarmed", [False, True])
def test_doctor_without_compiler_looks_for_a_prewarmed_cache(machine, store, prewarmed):
    machine(1, H100, compiler=False)
    if prewarmed:
        publish(store, make_key())
    report, checks = diagnosis()
    assert (report["compile"], report["launch"], report["ok"]) == (False, prewarmed, prewarmed)
    assert checks["CuTe DSL"]["stops"] == ["compile"]


def test_doctor_finds_what_stops_a_compile(machine, monkeypatch, store, entry, tmp_path):
    machine(0, CPU_BUILD)
    with monkeypatch.context() as m:
        m.setenv("JITMLA_CC", "no-such-compiler")
        report, checks = diagnosis()
        assert not report["ok"] and "JITMLA_CC" in checks["linker"]["remedy"]
    with monkeypatch.context() as m:
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho no crtbegin >&2; exit 1\n")
        broken.chmod(0o755)
        m.setenv("JITMLA_CC", str(broken))
        report, checks = diagnosis()
        assert not report["ok"] and "no crtbegin" in checks["linker"]["found"]
    with monkeypatch.context() as m:
        m.setattr(doctor, "COMPILER_PROBE", "raise ImportError('libX.so is missing')")
        report, checks = diagnosis()
        assert not report["ok"] and "libX.so is missing" in checks["CuTe DSL"]["found"]
    with monkeypatch.context() as m:
        m.setenv("JITMLA_CACHE_DIR", "/proc/nothing/here")
        report, checks = diagnosis()
        assert not report["ok"] and "cannot be written" in checks["cache"]["found"]
    os.chmod(store.root, 0o777)
    report, checks = diagnosis()
    assert not report["ok"] and "chmod" in checks["cache"]["remedy"]
    os.chmod(store.root, 0o700)
    assert diagnosis()[0]["ok"]


@pytest.mark.parametrize("init, count, gpus", [(0, 2, 2), (100, 2, 0), (0, None, 0)])
def test_doctor_asks_the_driver_for_gpus(monkeypatch, init, count, gpus):
    """100: CUDA_ERROR_NO_DEVICE. None: the driver does not say how many."""
    def get_count(pointer):
        pointer._obj.value = count or 7
        return 0 if count is not None else 1

    driver = types.SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=get_count)
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: driver)
    assert doctor.gpu_count() == gpus


def test_doctor_waits_for_no_probe_for_ever(machine, monkeypatch):
    machine(1, "import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    report, checks = diagnosis()
    assert not report["launch"] and "no answer after 0.2 s" in checks["torch"]["found"]


def test_doctor_names_each_package_that_is_missing(machine, monkeypatch):
    machine(1, "raise SystemExit(3)")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "_runtimes", dict)
    report, checks = diagnosis()
    assert not report["launch"] and "exit status 3" in checks["torch"]["found"]
    assert checks["apache-tvm-ffi"]["remedy"] == "pip install apache-tvm-ffi"
    assert "JITMLA_CUTE_RUNTIME" in checks["runtime library"]["remedy"]


def test_doctor_counts_what_the_layers_hold(machine, monkeypatch, tmp_path):
    machine(0, CPU_BUILD)
    publish(Store(tmp_path / "layer"), make_key())
    monkeypatch.setenv("JITMLA_CACHE_PATH", str(tmp_path / "layer"))
    assert diagnosis()[1]["cache layer"]["found"] == f"{tmp_path / 'layer'}: 1 entry"


def test_a_store_made_by_the_command_is_private(builder, cache_dir):
    assert cli("prewarm", *SPEC).exit_code == 0
    assert cache_dir.stat().st_mode & 0o777 == 0o700 and len(list(Store().entries())) == 1
