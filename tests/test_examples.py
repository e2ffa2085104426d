"""Every example runs. Those that need a GPU are left to `make test-gpu`."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile

import pytest

from jitmla import bundle
from jitmla.store import Store

from .conftest import REPOSITORY
from .support.keys import SO_BYTES, make_key, publish
from .support.tiny import needs_compiler
from .support.tree import snapshot, unprivileged

EXAMPLES = REPOSITORY / "examples"


def run(env, name, *args):
    command = [sys.executable, EXAMPLES / name, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_the_list_is_complete():
    listed = set(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}


def test_decode(python_env):
    done = run({**python_env, "CUDA_VISIBLE_DEVICES": ""}, "decode.py")
    assert done.returncode == 0, done.stderr
    assert "out [3, 1, 16, 512] torch.bfloat16 on cpu" in done.stdout


def test_tiny_mla(python_env):
    done = run({**python_env, "CUDA_VISIBLE_DEVICES": ""}, "tiny_mla.py")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "equal tokens on cpu", done.stdout + done.stderr
    assert done.stdout.count("plain PyTorch") == 3 and "DIFFERENT" not in done.stdout


def test_keys(python_env):
    done = run(python_env, "keys.py", "kimi-k2", "8")
    assert done.returncode == 0, done.stderr
    assert "kimi-k2 on 8 ranks can reach 7 kernels" in done.stdout and '"""' in done.stdout


def test_read_only_layer(python_env, tmp_path, store, key, monkeypatch):
    """From a bundle to a layer that every user can read, and that a process finds kernels in."""
    bundle.write(tmp_path / "bundle", [publish(store, key), publish(store, make_key(page_size=16))])
    digest = hashlib.sha256((tmp_path / "bundle").read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        layer = os.path.join(folder, "layer")
        done = run(python_env, "read_only_layer.py", tmp_path / "bundle", layer, digest)
        assert done.returncode == 0, done.stderr
        assert "2 kernels" in done.stdout and f"JITMLA_CACHE_PATH={layer}" in done.stdout
        assert {state[0] & 0o777 for state in snapshot(layer).values()} == {0o555, 0o444}
        assert os.listdir(os.path.join(layer, "v1")) == ["sm_90a"]
        monkeypatch.setenv("JITMLA_CACHE_PATH", layer)
        monkeypatch.setenv("JITMLA_CACHE_DIR", "/proc/nowhere")
        with unprivileged():
            assert Store().find(key).so_bytes == SO_BYTES
        for path, _, _ in os.walk(layer):
            os.chmod(path, 0o755)
    refused = run(python_env, "read_only_layer.py", tmp_path / "bundle", tmp_path / "other", "0" * 64)
    assert refused.returncode == 1 and "its sha256 is" in refused.stderr and not (tmp_path / "other").exists()


def check_demo(done):
    """What `make demo` shows: the request, the choice, both times, the source and the check."""
    assert done.returncode == 0, done.stderr
    lines = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert lines["request"].startswith("deepseek-v3, one new token: mla_decode(arch=sm_90a, dtype=bf16")
    assert "variant" in lines["choice"]
    with open(lines["source"], encoding="utf-8") as file:
        assert "def entry()" in file.read()
    cold = float(re.match(r"([\d.]+) s from an empty cache", lines["cold"]).group(1))
    warm = [float(ms) for ms in re.findall(r"([\d.]+) ms to", lines["warm"])]
    assert len(warm) == 2 and sum(warm) / 1e3 < cold
    assert lines["check"].startswith("matches float64")
    return lines


def test_demo_without_gpu(python_env, tmp_path):
    lines = check_demo(run({**python_env, "CUDA_VISIBLE_DEVICES": ""}, "demo.py", str(tmp_path / "demo")))
    assert lines["call"].endswith("on cpu: backend reference") and "time" not in lines


@pytest.mark.gpu
@needs_compiler
def test_demo_with_gpu(python_env, tmp_path):
    lines = check_demo(run(python_env, "demo.py", str(tmp_path / "demo")))
    assert lines["call"].endswith("on cuda: backend sm90") and " us for " in lines["time"]


@pytest.mark.gpu
def test_cuda_graph(python_env):
    done = run(python_env, "cuda_graph.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees with the reference") == 2


def test_serving(python_env):
    """Without a GPU, and with a cache that nobody may fill: the reference serves the loop."""
    done = run({**python_env, "CUDA_VISIBLE_DEVICES": "", "JITMLA_ON_MISS": "load"}, "serving.py")
    assert done.returncode == 0, done.stderr
    first, *steps, last = done.stdout.splitlines()
    assert re.fullmatch(r"0 of \d+ kernels for sm_90a are in the cache", first)
    assert "lengths [0, 71, 0, 0]" in steps[-2] and last.startswith("right at every step on cpu")


@pytest.mark.gpu
def test_serving_does_not_boot_with_an_empty_cache(python_env):
    done = run({**python_env, "JITMLA_ON_MISS": "load"}, "serving.py")
    assert done.returncode == 1 and "MissNotAllowed" in done.stderr and "jitmla prewarm" in done.stderr


@pytest.mark.gpu
@needs_compiler
def test_serving_with_gpu(python_env):
    done = run(python_env, "serving.py")
    assert done.returncode == 0 and "right at every step on cuda" in done.stdout, done.stdout + done.stderr


def test_dsa_layer(python_env):
    done = run({**python_env, "CUDA_VISIBLE_DEVICES": ""}, "dsa_layer.py")
    assert done.returncode == 0, done.stderr
    assert "output [40, 256], 32 rows of it are not zero" in done.stdout
    assert done.stdout.count("request 0 attends to") == 3
