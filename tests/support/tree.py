"""What lies in a folder, and being somebody else."""

import contextlib
import os
from pathlib import Path


def snapshot(root):
    """{relative path: (mode, size, mtime, bytes of a file)} of everything under `root`."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [".", *folders, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            data = Path(path).read_bytes() if name in files and os.path.isfile(path) else None
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_size, status.st_mtime_ns, data)
    return found


@contextlib.contextmanager
def unprivileged(*roots):
    """Run the block as a user whom permission bits bind: as root, the user `nobody`, who is given `roots`."""
    if os.geteuid() != 0:
        yield
        return
    for root in roots:
        for folder, _, files in os.walk(root):
            for path in [folder, *(os.path.join(folder, f) for f in files)]:
                os.chown(path, 65534, -1)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
