"""Keys and entries for tests of the cache, which does not care what is in a library."""

import random

from jitmla import toolchain
from jitmla.key import Key
from jitmla.spec import Spec

SOURCE = "# a kernel\n" * 40
SO_BYTES = random.Random(7).randbytes(4096)
KERNELS = [{"name": "kernel_0", "registers": 32, "spill_bytes": 0, "stack_bytes": 0}]
FACTS = {"arch": "sm_90a", "dtype": "bf16", "kv_dtype": "bf16", "kv_lora_rank": 512, "qk_rope_head_dim": 64,
         "page_size": 64, "rows": 512, "causal": False}
TOOLCHAIN = {"cute_dsl": "4.8.1", "cuda": "cu12", "host": toolchain.host(), "options": ""}


def make_key(*, template_digest="ab" * 32, constants=(("FACTOR", 2.0),), toolchain=None, **facts):
    """A valid Key. `toolchain`: fields that differ from TOOLCHAIN, or False for a Key without one."""
    tools = None if toolchain is False else tuple(sorted({**TOOLCHAIN, **(toolchain or {})}.items()))
    return Key(Spec.of("mla_decode", **{**FACTS, **facts}), "tiny", template_digest, "only", tuple(constants), tools)


def publish(store, key, source=SOURCE, so_bytes=SO_BYTES):
    return store.publish(key, source, so_bytes, KERNELS)
