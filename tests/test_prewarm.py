"""Many Keys at once: several archs, Keys from a file, exit codes for a script, resuming, and how long it takes."""

import _thread
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from jitmla import bounds, compile, events, lock, models, prewarm, registry
from jitmla.cli import app
from jitmla.compile import Built
from jitmla.errors import CacheUnwritable, CompileFailed
from jitmla.pool import Pool
from jitmla.store import LOCKS, Store

from .support.keys import KERNELS, SO_BYTES, make_key
from .support.processes import PATIENCE, alive, at_once, program, running, wait_until
from .support.tiny import SOURCE as TINY
from .support.tiny import needs_compiler, tiny_key

MODEL = ["--model", "deepseek-v3", "--tp", "8"]


def cli(*args, **options):
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False, env={"COLUMNS": "200"}, **options)


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def builder(monkeypatch):
    """A compiler that takes no time; it fails for the page sizes in `builder.refuses`."""
    def build(key, source, **_):
        if key.spec["page_size"] in build.refuses:
            raise CompileFailed(f"to compile {key.name}", differs="it is refused")
        return Built(SO_BYTES, source, KERNELS, 0.0)

    build.refuses = ()
    monkeypatch.setattr(compile, "build", build)
    return build


# ------------------------------------------------------------------------------------------------------ several archs


def test_what_has_no_template_is_reported_and_the_rest_is_compiled(builder, without_portable):
    done = cli("prewarm", *MODEL, "--arch", "sm_90a,sm_100a", "--page-size", "64", "--json")
    found = objects(done.stdout)
    assert done.exit_code == 3
    by_arch = {arch: [o for o in found if o["spec"]["arch"] == arch] for arch in ("sm_90a", "sm_100a")}
    assert {o["status"] for o in by_arch["sm_90a"]} == {"compiled"}
    for o in by_arch["sm_100a"]:
        assert (o["status"], o["key"], o["error"]) == ("unserved", None, "NoTemplate")
        assert "arch=sm_100a" in o["differs"]
    assert {o["key"] for o in by_arch["sm_90a"]} == {
        k.digest for k in models.keys_for("deepseek-v3", tp=8, page_sizes=[64])}
    told = cli("prewarm", *MODEL, "--arch", "sm_90a,sm_100a", "--page-size", "64")
    counts = f"{len(by_arch['sm_90a'])} hit, {len(by_arch['sm_100a'])} unserved"
    assert told.exit_code == 3 and counts in told.stdout and "arch=sm_100a" in told.stderr


def test_failed_outranks_unserved(builder, without_portable):
    builder.refuses = (64,)
    assert cli("prewarm", *MODEL, "--arch", "sm_90a,sm_100a", "--page-size", "64").exit_code == 1


def test_a_use_that_nobody_serves_among_others(builder, without_portable):
    done = cli("prewarm", *MODEL, "--arch", "sm_90a", "--page-size", "64", "--uses", "compact", "--json")
    assert done.exit_code == 3
    found = {(o["spec"].get("compact", False), o["status"]) for o in objects(done.stdout)}
    assert found == {(False, "compiled"), (True, "unserved")}


def test_an_arch_that_does_not_exist_stops_everything(builder, store):
    assert cli("prewarm", *MODEL, "--arch", "sm_90a,sm_90").exit_code == 2
    assert list(store.entries()) == []


# ---------------------------------------------------------------------------------------------------------- --keys-from


def test_keys_from_what_prewarm_printed(builder, tmp_path, store, without_portable):
    builder.refuses = (16,)
    first = cli("prewarm", *MODEL, "--arch", "sm_90a,sm_100a", "--json")
    (tmp_path / "keys.jsonl").write_text(first.stdout)
    before = sorted((o["status"], o["spec"]["arch"]) for o in objects(first.stdout))
    assert {status for status, _ in before} == {"compiled", "failed", "unserved"}
    builder.refuses = ()
    compile.forget_failures()
    bounds.sweep(store.root, failures=True)
    again = cli("prewarm", "--keys-from", tmp_path / "keys.jsonl", "--json")
    assert again.exit_code == 3
    became = {"compiled": "hit", "failed": "compiled", "unserved": "unserved"}
    assert sorted((o["status"], o["spec"]["arch"]) for o in objects(again.stdout)) == sorted(
        (became[status], arch) for status, arch in before)


@pytest.mark.parametrize("form", ["list", "lines", "stdin"])
def test_keys_from_specs(builder, tmp_path, form):
    specs = [spec.as_dict() for spec in models.specs_for("kimi-k2", tp=8, arch="sm_90a", page_sizes=[64])]
    text = json.dumps(specs) if form == "list" else "\n\n".join(map(json.dumps, specs))
    (tmp_path / "specs.json").write_text(text)
    done = (cli("prewarm", "--keys-from", "-", "--json", input=text) if form == "stdin" else
            cli("prewarm", "--keys-from", tmp_path / "specs.json", "--json"))
    assert done.exit_code == 0 and [o["spec"] for o in objects(done.stdout)] != []
    assert {json.dumps(o["spec"]) for o in objects(done.stdout)} == {json.dumps(s) for s in specs}


def test_keys_from_for_another_arch(builder, tmp_path):
    [spec] = models.specs_for("deepseek-v3", tp=8, arch="sm_100a", page_sizes=[64], max_s_q=1)
    facts = spec.as_dict()
    del facts["arch"]
    (tmp_path / "specs.json").write_text(json.dumps([facts, spec.as_dict()]))
    [found] = objects(cli("prewarm", "--keys-from", tmp_path / "specs.json", "--arch", "sm_90a", "--json").stdout)
    assert (found["status"], found["spec"]["arch"]) == ("compiled", "sm_90a")


@pytest.mark.parametrize("text, differs", [
    ("{", "line 1: Expecting"), ("[1]", "item 0: 1 is no Spec"), ("[", "Expecting"), ('"x"', 'line 1: "x" is no Spec'),
    ('{"op": "mla_decode", "arch": "sm_90a"}', "'dtype' is missing"), ('{"op": "conv"}', "no such op"),
    ('\n{"spec": {"op": 3}}', "line 2")])
def test_a_file_of_something_else(builder, tmp_path, text, differs):
    (tmp_path / "keys").write_text(text)
    done = cli("prewarm", "--keys-from", tmp_path / "keys", "--json")
    [problem] = objects(done.stdout)
    assert done.exit_code == 2 and problem["error"] == "InvalidArgument" and differs in problem["differs"]


def test_a_file_that_is_not_there(tmp_path):
    assert cli("prewarm", "--keys-from", tmp_path / "nothing").exit_code == 2


@pytest.mark.parametrize("args", [["--keys-from", "x", *MODEL], ["--keys-from", "x", "--spec", "rows=8"],
                                  ["--keys-from", "x", "--page-size", "64"], []])
def test_options_that_exclude_each_other(args):
    assert cli("prewarm", *args).exit_code == 2


# ------------------------------------------------------------------------------------------------------------ resuming


@needs_compiler
def test_interrupted_it_keeps_what_is_done_and_goes_on_from_there(python_env, store, tmp_path):
    """The real command, pool and compiler. The kernels are tiny; the third one hangs until it is let go."""
    note = tmp_path / "note"
    hang = (f"import os, pathlib, time\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n"
            f"while not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)\n")
    text = ("from jitmla import registry\nfrom jitmla.cli import main\nfrom tests.support.tiny import SOURCE\n"
            f"registry.Choice.source = lambda self: ({hang!r} if self.spec['page_size'] == 64 else '') + SOURCE\n"
            "main()\n")
    command = ["-c", text, "prewarm", *MODEL, "--arch", "sm_90a", "--max-s-q", "1", "--json"]
    with program(*command, "--jobs", "1", env=python_env) as first:
        assert wait_until(lambda: note.exists() and note.read_text())
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130 and "Traceback" not in err
    done = {o["key"] for o in objects(out)}
    assert len(done) == 2 and {found.digest for found in store.entries()} == done
    assert wait_until(lambda: not alive(int(note.read_text())))
    (tmp_path / "go").touch()
    second = subprocess.run([sys.executable, *command], env=python_env, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert {o["key"] for o in objects(second.stdout) if o["status"] == "hit"} == done
    assert [o["status"] for o in objects(second.stdout)].count("compiled") == 2


# --------------------------------------------------------------------------------------------------------- the figures


@needs_compiler
@pytest.mark.budget
def test_16_keys_on_2_cores_take_at_most_0_6_of_16_single_compiles(store, monkeypatch, figure):
    """Wall time; single compiles before and after, so that a machine that gets busy meanwhile does not decide."""
    monkeypatch.setattr(registry.Choice, "source", lambda self: TINY)
    specs = models.specs_for("deepseek-v3", tp=16, arch="sm_90a")
    wanted, _ = prewarm.choices(specs)
    assert len(wanted) >= 16

    def single():
        start = time.perf_counter()
        for choice in wanted[:2]:
            compile.build(choice.key, TINY)
        return (time.perf_counter() - start) / 2

    before = single()
    start = time.perf_counter()
    outcomes = prewarm.run(wanted[:16], store, 2)
    together = time.perf_counter() - start
    assert [o.status for o in outcomes] == ["compiled"] * 16
    alone = 16 * max(before, single())
    figure("prewarm of 16 Keys on 2 cores", together / alone, 0.6, "of the time of 16 single compiles")


def each_in_every_process(keys, root, build):
    """What each of 64 processes finds under each Key, having asked for all of them in an order of its own start."""
    def action(i):
        found = {}
        for key in keys:
            entry = compile.get_or_compile(key, lambda: TINY, Store(root), builder=build)
            found[key.digest] = entry.manifest["files"]["kernel.so"]["sha256"]
        return found

    return action


def test_64_processes_and_8_keys_compile_8_times(store, tmp_path):
    keys = [make_key(constants=(("FACTOR", float(n)),)) for n in range(8)]

    def slow(key, source, store=None):
        with open(tmp_path / "compiles", "a") as file:
            file.write(f"{key.digest}\n")
        time.sleep(0.1)
        return Built(SO_BYTES + key.digest.encode(), source, KERNELS, 0.1)

    results = at_once(64, each_in_every_process(keys, store.root, slow), tmp_path)
    assert sorted((tmp_path / "compiles").read_text().split()) == sorted(key.digest for key in keys)
    assert all(result == results[0] and len(result) == 8 for result in results)
    assert all(store.find(key) for key in keys)


def test_who_waits_says_for_whom_and_takes_what_the_other_made(store, monkeypatch, seen, tmp_path):
    """And when that process is killed, compiles it."""
    [choice], _ = prewarm.choices(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", page_sizes=[64], max_s_q=1))
    built = Built(SO_BYTES, "# a kernel\n", KERNELS, 0.0)
    monkeypatch.setattr(lock, "WAIT_EVENT_SECONDS", 0.1)
    monkeypatch.setattr(compile, "build", lambda *args, **options: built)
    holder = store.side_folder(LOCKS) / f"{choice.key.digest}.holder"

    def other():
        def until_it_is_enough(key, source, store=None):
            wait_until((tmp_path / "enough").exists, 600)
            return built
        compile.get_or_compile(choice.key, choice.source, Store(store.root), builder=until_it_is_enough)

    def waited(then):
        """prewarm's outcome for the Key that another process, `pid`, holds; `then(pid)` after two `wait` events."""
        seen.clear()
        with running(other) as pid:
            assert wait_until(lambda: lock.describe(holder) != "another process")
            end = events.subscribe(lambda event: [e.kind for e in seen].count("wait") == 2 and then(pid))
            [outcome] = prewarm.run([choice], store, 1)
            end()
        waits = [e.fields for e in seen if e.kind == "wait"]
        assert f"pid {pid} on {socket.gethostname()}" in waits[0]["holder"]
        assert waits[-1]["seconds"] > 0 and waits[-1]["kernel"] == choice.key.name
        return outcome

    def kill(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    assert waited(kill).status == "compiled"
    shutil.rmtree(store.path(choice.key))
    assert waited(lambda pid: (tmp_path / "enough").touch()).status == "hit"


@needs_compiler
@pytest.mark.budget
def test_64_processes_and_8_keys_with_the_real_compiler(store, tmp_path, figure):
    """At most 1.3 times the time of the 8 compiles one after the other."""
    keys = [tiny_key(constants=(("FACTOR", float(n)),)) for n in range(8)]

    def serial():
        start = time.perf_counter()
        shas = [compile.build(key, TINY).so_bytes for key in keys]
        return time.perf_counter() - start, shas

    def counted(*args, **kwargs):
        with open(tmp_path / "compiles", "a") as file:
            file.write(f"{os.getpid()}\n")
        return compile.build(*args, **kwargs)

    before, libraries = serial()
    start = time.perf_counter()
    results = at_once(64, each_in_every_process(keys, store.root, counted), tmp_path)
    wall = time.perf_counter() - start
    after, _ = serial()
    assert len((tmp_path / "compiles").read_text().split()) == 8
    assert all(result == results[0] and len(result) == 8 for result in results)
    assert [store.find(key).so_bytes for key in keys] == libraries
    figure("64 processes that want 8 Keys at once", wall / max(before, after), 1.3, "of the time of 8 single compiles")


def test_an_error_that_nobody_expects_is_raised_where_the_outcomes_are_read(store, hanging, monkeypatch):
    wanted, _ = prewarm.choices(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", max_s_q=1))
    monkeypatch.setattr(registry.Choice, "source", lambda self: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        prewarm.run(wanted, store, 2)
    assert hanging.was_stopped()


def test_compiled_and_not_stored_is_a_failure_where_it_must_be_stored(builder, store, monkeypatch):
    def full(*args):
        raise CacheUnwritable("to write to the kernel cache", differs="No space left on device")

    wanted, _ = prewarm.choices(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", page_sizes=[64], max_s_q=1))
    monkeypatch.setattr(Store, "publish", full)
    [outcome] = prewarm.run(wanted, store, 1)
    assert outcome.status == "failed" and "not stored" in str(outcome.error)
    [outcome] = prewarm.run(wanted, store, 1, must_store=False)
    assert outcome.status == "compiled" and outcome.entry.so_bytes == SO_BYTES


class Hanging:
    """A compiler in which every compile hangs until it is stopped. `begun` is set by the first, `gave_up` by one that
    nobody stops."""

    def __init__(self, monkeypatch):
        self.begun, self.stopped, self.gave_up = threading.Event(), threading.Event(), threading.Event()
        monkeypatch.setattr(Pool, "build", self.build)
        monkeypatch.setattr(Pool, "close", lambda pool: self.stopped.set())

    def build(self, *args, **options):
        self.begun.set()
        if not self.stopped.wait(PATIENCE):
            self.gave_up.set()
        raise CompileFailed("to compile", differs="it was stopped")

    def was_stopped(self):
        return self.stopped.is_set() and not self.gave_up.is_set()


@pytest.fixture
def hanging(monkeypatch):
    return Hanging(monkeypatch)


def test_a_signal_that_wakes_nobody_is_seen_all_the_same(store, hanging):
    """One that arrives while the thread is about to fall asleep: noted, without an end to any system call. That is what
    interrupt_main does."""
    wanted, _ = prewarm.choices(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", max_s_q=1))

    def interrupt():
        hanging.begun.wait(PATIENCE)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        prewarm.run(wanted, store, 2)
    thread.join()
    assert hanging.was_stopped()


def test_what_a_listener_raises_ends_the_run_at_once(store, hanging):
    """While its traceback, and with it all frames, is kept."""
    wanted, _ = prewarm.choices(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", max_s_q=1))
    store.publish(wanted[0].key, wanted[0].source(), SO_BYTES, KERNELS)

    def listener(outcome):
        assert outcome.status == "hit" and hanging.begun.wait(PATIENCE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        prewarm.run(wanted, store, 2, listener)
    assert hanging.was_stopped() and caught.tb is not None
    assert wait_until(lambda: not any(thread.name.endswith("(_work)") for thread in threading.enumerate()))


def test_interrupted_before_its_threads_have_started(store, hanging, monkeypatch):
    wanted, _ = prewarm.choices(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", max_s_q=1))
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        assert hanging.begun.wait(PATIENCE)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prewarm.run(wanted, store, 2)
    assert hanging.was_stopped()


@needs_compiler
def test_interrupted_it_leaves_no_compiler(store, monkeypatch, tmp_path):
    note = tmp_path / "note"
    source = f"import pathlib, time\npathlib.Path({str(note)!r}).touch()\ntime.sleep(600)\n"
    monkeypatch.setattr(registry.Choice, "source", lambda self: source)
    wanted, _ = prewarm.choices(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", max_s_q=1))
    servers = []
    started = Pool._started
    monkeypatch.setattr(Pool, "_started", lambda self: servers.append(started(self)) or servers[-1])
    thread = threading.Thread(target=lambda: wait_until(note.exists) and os.kill(os.getpid(), signal.SIGINT))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        prewarm.run(wanted, store, 2)
    thread.join()
    assert wait_until(lambda: not any(alive(s.process.pid) for s in servers if s))
