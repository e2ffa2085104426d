"""What starting costs, in processor time: `import jitmla` at most 60 ms, the help of the command at most 300 ms."""

import subprocess
import sys

import pytest

IMPORT = "import jitmla"
HELP = ("import jitmla.cli, typer.testing\n"
        "assert typer.testing.CliRunner().invoke(jitmla.cli.app, ['prewarm', '--help']).exit_code == 0")
HEAVY = {"torch", "cutlass", "tvm_ffi", "numpy", "jsonschema"}


@pytest.mark.budget
@pytest.mark.parametrize("code, limit, absent", [(IMPORT, 60, HEAVY | {"filelock", "typer"}), (HELP, 300, HEAVY)],
                         ids=["import", "help"])
def test_starting(python_env, figure, code, limit, absent):
    """User and system time, the best of five; the 15 ms of an interpreter that imports nothing are not counted."""
    program = (f"import sys, time\nbefore = time.process_time()\n{code}\nprint((time.process_time() - before) * 1e3)\n"
               f"assert not {absent} & set(sys.modules)")
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=python_env)
            for _ in range(5)]
    name = "`import jitmla`" if code == IMPORT else "`jitmla prewarm --help`"
    figure(name, min(float(run.stdout) for run in runs), limit, "ms of a core")
