"""A read-only layer for a container image, made from a bundle.

Where the compiler is, after a prewarm:

    jitmla cache export kernels.bundle --model deepseek-v3 --tp 8 --arch sm_90a

When the image is built (see Dockerfile), and in the image:

    python read_only_layer.py kernels.bundle /opt/kernels [SHA256]
    JITMLA_CACHE_PATH=/opt/kernels

Neither of these needs a compiler or a GPU. Every user of the image can read the layer; nobody can write it.
"""

import os
import shutil
import sys
from pathlib import Path

from jitmla import bundle
from jitmla.layer import LAYOUT, Layer
from jitmla.store import Store


def main(file, root, sha256=""):
    keys = []
    for entry, status in bundle.load(Path(file), Store(root), sha256):
        keys.append(entry.key)
        print(f"{status}: {entry.key.name} for {entry.key.spec.arch}, {len(entry.so_bytes)} bytes")
    for side in Path(root, LAYOUT).glob(".*"):  # marks of use, staging: a layer has no need of them
        shutil.rmtree(side)
    for folder, _, files in os.walk(root):
        os.chmod(folder, 0o555)
        for name in files:
            os.chmod(os.path.join(folder, name), 0o444)
    layer = Layer(root)
    assert all(layer.find(key) for key in keys)
    print(f"{len(keys)} kernels in {layer.root}; in the image: JITMLA_CACHE_PATH={layer.root}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
