"""`import jitmla` costs at most 60 ms of processor time, and brings nothing heavy."""

import os
import subprocess
import sys

BUDGET_MS = 60
CODE = """\
import os, sys
before = os.times()
import jitmla
after = os.times()
assert not {'torch', 'cutlass', 'tvm_ffi', 'numpy', 'filelock', 'jsonschema'} & set(sys.modules)
print((after.user + after.system - before.user - before.system) * 1e3)
"""
WHOLE = "import jitmla, os; t = os.times(); print((t.user + t.system) * 1e3)"
EMPTY = "import os; t = os.times(); print((t.user + t.system) * 1e3)"


def milliseconds(code):
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": path})
    return float(done.stdout)


def test_import(capsys):
    """os.times() counts in steps of 10 ms, so the whole process less an empty one is measured as well."""
    inside = min(milliseconds(CODE) for _ in range(3))
    whole = min(milliseconds(WHOLE) for _ in range(5)) - min(milliseconds(EMPTY) for _ in range(5))
    with capsys.disabled():
        print(f"\nimport jitmla: {max(inside, whole):.0f} ms of processor time")
    assert max(inside, whole) <= BUDGET_MS
