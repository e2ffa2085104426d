"""On a GPU: warm, freeze, capture, replay."""

import json
import os
import subprocess
import sys

import pytest

from ..support.marks import ON_HOPPER

torch = pytest.importorskip("torch")

pytestmark = ON_HOPPER


def test_after_warm_and_freeze_first_calls_are_captured_and_touch_nothing(python_env, cache_dir):
    """In a process of its own, which stays frozen. The kernels are those of tests/keysets.py."""
    done = subprocess.run([sys.executable, "-m", "tests.support.frozen_capture"], capture_output=True, text=True,
                          env={**python_env, "JITMLA_CACHE_DIR": os.fspath(cache_dir)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "page_size: 16 asked, 64 loaded" in found.pop("refused")
    assert found == {"graphs": 4, "touched": {}, "events": {}}
