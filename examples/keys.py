"""What there is to know without a GPU: every Key that a model can reach, and the source that one of them names.

Nothing is compiled. `python examples/keys.py [MODEL] [TP]`, by default deepseek-v3 on 8 ranks.
"""

from __future__ import annotations

import sys

import jitmla
from jitmla import registry

model = sys.argv[1] if len(sys.argv) > 1 else "deepseek-v3"
tp = int(sys.argv[2]) if len(sys.argv) > 2 else 8

keys = jitmla.keys_for(model, tp=tp, arch="sm_90a", page_sizes=[64])
print(f"{model} on {tp} ranks can reach {len(keys)} kernels for sm_90a with pages of 64 tokens:")
for key in keys:
    print(f"  {key.name:36} rows={key.spec['rows']} causal={key.spec['causal']} constants={dict(key.constants)}")

choice = registry.choose(keys[0].spec)
source = choice.source() if keys[0].toolchain else choice.template.source
print(f"\nThe source of the first one has {len(source.splitlines())} lines. It begins:\n")
print("\n".join(source.splitlines()[:8]))
