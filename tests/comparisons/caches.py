"""The kernel caches of quack and FlashInfer beside this one: damaged bytes, killed writers, moved folders, two archs in
one folder, foreign owners. Their own code runs, with a kernel of their own, on a machine that needs no GPU.

    python tests/comparisons/caches.py [--only NAME] [--json FILE]

in an environment that has jitmla, quack-kernels and flashinfer-python. By hand, as root (to give files away); not a
part of the tests. docs/cache.md shows the results.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLIPS, KILLS = 200, 100
ARCHS = ("sm_90a", "sm_100a")
STRANGER = 12345


class WouldCompile(Exception):
    """Raised in place of a compile by a process that only wants to know whether there is a hit."""


class Quack:
    """quack.cache.jit_cache around the forward softmax of quack."""

    package, seat = "quack-kernels", "QUACK_CACHE_DIR"

    def __init__(self):
        import cutlass
        from quack.cache import jit_cache

        softmax = importlib.import_module("quack.softmax").Softmax
        self.types, self.built, self.may_build = (cutlass.BFloat16, cutlass.BFloat16, 1024), None, True

        def compile(*args):
            if not self.may_build:
                raise WouldCompile
            self.built = self.built or softmax.compile.__wrapped__(*args)
            return self.built

        self.cached = jit_cache(compile)

    def get(self):
        self.cached.cache_clear()
        self.cached(*self.types)

    def files(self, root):
        return [path for path in Path(root).rglob("*") if path.suffix == ".o"]


class FlashInfer:
    """flashinfer.jit.cute_dsl_core around FlashInfer's rmsnorm with sigmoid gate."""

    package, seat = "flashinfer-python", "FLASHINFER_WORKSPACE_BASE"

    def __init__(self):
        core = importlib.import_module("flashinfer.jit.cute_dsl_core")
        self.kernel = importlib.import_module("flashinfer.norm.kernels.rmsnorm_sigmoid_gate")
        self.built, self.may_build = None, True

        def build_and_load(module, name, compile, extra_key_files=()):
            def once():
                if not self.may_build:
                    raise WouldCompile
                self.built = self.built or compile()
                return self.built
            return core.build_and_load_cute_dsl_kernel(module, name, once, extra_key_files)

        self.kernel.build_and_load_cute_dsl_kernel = build_and_load

    def get(self):
        self.kernel._get_compiled.__wrapped__(16, 1024, 1024, 8, 4, 1)

    def files(self, root):
        return [path for path in Path(root).rglob("*") if path.suffix == ".o" or path.name == "meta.json"]


class Jitmla:
    """jitmla.compile.get_or_compile around mla_decode."""

    package, seat = "jitmla", "JITMLA_CACHE_DIR"

    def __init__(self):
        from jitmla import compile, load, models, registry
        from jitmla.store import Store

        self.compile, self.load, self.store = compile, load, Store
        spec = models.specs_for("deepseek-v3", tp=8, arch=os.environ["CUTE_DSL_ARCH"], page_sizes=[64], max_s_q=1)[0]
        try:
            self.choice = registry.choose(spec)
        except NotImplementedError:  # no template for this arch: the sm_90a one under a Key of the other arch
            from dataclasses import replace
            self.choice = registry.choose(models.specs_for("deepseek-v3", tp=8, arch="sm_90a", page_sizes=[64],
                                                           max_s_q=1)[0])
            key = replace(self.choice.key, spec=spec)
            self.choice.__dict__["key"] = key
        self.built, self.may_build = None, True

    def get(self):
        def builder(key, source, store=None):
            if not self.may_build:
                raise WouldCompile
            self.built = self.built or self.compile.build(key, source, store)
            return self.built

        entry = self.compile.get_or_compile(self.choice.key, self.choice.source, self.store(), builder=builder)
        self.load.load(entry, "mla_decode")

    def files(self, root):
        return [path for path in Path(root, "v1").glob("sm_*/*/*/*") if path.is_file()]


PEERS = {"quack": Quack, "flashinfer": FlashInfer, "jitmla": Jitmla}


def outcome(peer, build=False):
    """What a fresh process gets: "loaded", "would compile", "refused: ...", or how it ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        peer.may_build = build
        try:
            peer.get()
            said = "loaded"
        except WouldCompile:
            said = "would compile"
        except BaseException as e:
            said = f"refused: {type(e).__name__}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said or f"died: signal {os.WTERMSIG(status)}"


def tally(outcomes):
    return {said: outcomes.count(said) for said in sorted(set(outcomes))}


def flips(peer, root):
    """One flipped bit in a fresh copy of the artifact or of its metadata, FLIPS times."""
    assert outcome(peer, build=True) == "loaded" and outcome(peer) == "loaded"
    choose, files = random.Random(1), [(path, path.read_bytes()) for path in sorted(peer.files(root))]
    kept = shutil.copytree(root, f"{root}-kept", symlinks=True)
    found = []
    for _ in range(FLIPS):
        path, data = choose.choices(files, [len(data) for _, data in files])[0]
        i = choose.randrange(len(data))
        with open(path, "r+b") as file:
            file.seek(i)
            file.write(bytes([data[i] ^ 1 << choose.randrange(8)]))
        found.append(outcome(peer))
        shutil.rmtree(root)
        shutil.copytree(kept, root, symlinks=True)
    return tally(found)


def kills(peer, root):
    """SIGKILL at a random moment while an object that is already compiled is stored; then what the next process gets,
    and what is left beside it in the end."""
    peer.get()  # compiled in this process: a forked child only has to store it
    start = time.monotonic()
    shutil.rmtree(root)
    outcome(peer, build=True)
    span, choose, found = (time.monotonic() - start) * 1.1, random.Random(2), []
    for _ in range(KILLS):
        for path in peer.files(root):
            path.unlink() if path.suffix in (".o", ".json") and "v1" not in path.parts else shutil.rmtree(
                path.parent, ignore_errors=True)
        child = os.fork()
        if child == 0:
            peer.get()
            os._exit(0)
        time.sleep(choose.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(outcome(peer))
    left = [p for p in Path(root).rglob("*") if ".tmp." in p.name or (p.parent.name == ".staging" and p.is_dir())]
    said = tally(found) | {"left over": len(left)}
    if left:  # two hours later
        for path in left:
            os.utime(path, (time.time() - 7200,) * 2)
        for path in peer.files(root):
            path.unlink() if "v1" not in path.parts else shutil.rmtree(path.parent, ignore_errors=True)
        outcome(peer, build=True)
        said["left over after the next store, two hours later"] = sum(p.exists() for p in left)
    return said


def owners(peer, root):
    """The whole cache given to another user; then writable by everybody."""
    assert outcome(peer, build=True) == "loaded"

    def each(change):
        for folder, _, files in os.walk(root):
            for path in [folder, *(os.path.join(folder, name) for name in files)]:
                change(path)

    each(lambda path: os.chown(path, STRANGER, STRANGER))
    said = {"owned by another user": outcome(peer)}
    each(lambda path: os.chown(path, 0, 0))
    assert outcome(peer) == "loaded"
    each(lambda path: os.chmod(path, 0o777))
    return said | {"writable by everybody": outcome(peer)}


def moved(peer, root):
    """Only this much: the folder is moved by the parent, see `main`."""
    return {"then": outcome(peer)}


def fill(peer, root):
    return {"then": outcome(peer, build=True)}


SCENARIOS = {f.__name__: f for f in (flips, kills, owners, moved, fill)}


def worker(name, scenario, root):
    peer = PEERS[name]()
    print("RESULT", json.dumps(SCENARIOS[scenario](peer, root)), flush=True)


def run(name, scenario, root, arch=ARCHS[0], path=""):
    """The scenario in a process of its own, with a cache in `root`. path: where modules are looked for first."""
    os.makedirs(root, mode=0o700, exist_ok=True)
    setting = {"quack": {"CUTE_DSL_ARCH": arch, "QUACK_ARCH": arch}, "jitmla": {"CUTE_DSL_ARCH": arch},
               "flashinfer": {"CUTE_DSL_ARCH": arch, "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}}[name]
    env = {**os.environ, **setting, PEERS[name].seat: root, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1",
           "PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, __file__, "--worker", name, scenario, root], env=env, capture_output=True,
                          text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1][7:]) if lines else {"failed": done.stderr.strip().splitlines()[-1:]}


def relocations(name, folder):
    """The cache moved to another path; the same package installed in another place (its files copied)."""
    first, second = f"{folder}/first", f"{folder}/second place"
    run(name, "fill", first)
    os.rename(first, second)
    said = {"cache moved": run(name, "moved", second)["then"]}
    package = {"quack": "quack", "flashinfer": "flashinfer", "jitmla": "jitmla"}[name]
    source = Path(importlib.util.find_spec(package).origin).parent
    shutil.copytree(source, f"{folder}/site/{package}", ignore=shutil.ignore_patterns("__pycache__"))
    for beside in ("templates", "cache_schema.json") if name == "jitmla" else ():
        (shutil.copytree if beside == "templates" else shutil.copy)(source.parent / beside, f"{folder}/site/{beside}")
    said["package in another place"] = run(name, "moved", second, path=f"{folder}/site")["then"]
    return said


def archs(name, folder):
    """One folder, filled by a process for one arch, asked by a process for the other."""
    run(name, "fill", f"{folder}/cache", ARCHS[0])
    return {f"filled for {ARCHS[0]}, asked for {ARCHS[1]}": run(name, "moved", f"{folder}/cache", ARCHS[1])["then"]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=3)
    parser.add_argument("--only", choices=PEERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    results = {"date": time.strftime("%Y-%m-%d"), "host": f"{platform.system()} {platform.machine()}, "
               f"{os.cpu_count()} cores, no GPU", "python": platform.python_version(),
               "cute_dsl": importlib.metadata.version("nvidia-cutlass-dsl"), "flips": FLIPS, "kills": KILLS,
               "caches": {}}
    for name in [args.only] if args.only else PEERS:
        try:
            version = importlib.metadata.version(PEERS[name].package)
        except importlib.metadata.PackageNotFoundError:
            version = importlib.import_module(name).__version__
        results["caches"][name] = found = {"version": version}
        for scenario in ("flips", "kills", "owners"):
            with tempfile.TemporaryDirectory() as folder:
                found[scenario] = run(name, scenario, f"{folder}/cache")
            print(name, scenario, found[scenario], file=sys.stderr, flush=True)
        for scenario in (relocations, archs):
            with tempfile.TemporaryDirectory() as folder:
                found[scenario.__name__] = scenario(name, folder)
            print(name, scenario.__name__, found[scenario.__name__], file=sys.stderr, flush=True)
    text = json.dumps(results, indent=2) + "\n"
    if args.json:
        args.json.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
