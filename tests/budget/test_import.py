"""`import jitmla` costs at most 60 ms of processor time, and brings nothing heavy."""

import os
import subprocess
import sys

BUDGET_MS = 60
CODE = """\
import sys, time
before = time.process_time()
import jitmla
after = time.process_time()
assert not {'torch', 'cutlass', 'tvm_ffi', 'numpy', 'filelock', 'jsonschema'} & set(sys.modules)
print((after - before) * 1e3)
"""


def milliseconds():
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": path})
    return float(done.stdout)


def test_import(capsys):
    """User and system time. An interpreter that imports nothing takes 15 ms, which are not counted."""
    took = min(milliseconds() for _ in range(5))
    with capsys.disabled():
        print(f"\nimport jitmla: {took:.1f} ms of processor time")
    assert took <= BUDGET_MS
