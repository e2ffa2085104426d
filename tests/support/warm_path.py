"""Milliseconds of processor time from a Spec to a Plan that can be launched, the kernel on disk and torch imported.

Not counted: what happens once in a process whatever is launched (importing tvm_ffi, opening the runtime library), and
the CUDA driver, which this leaves out: `python -m tests.support.warm_path` (JITMLA_CACHE_DIR holds the Keys of MODEL).
"""

import time

import pytest
import torch
import tvm_ffi  # noqa: F401

from jitmla import dispatch, load, spec

from .gpu import Gpu


def main():
    with pytest.MonkeyPatch.context() as patch:
        gpu = Gpu(patch)
        load.runtime()
        device = torch.device("cuda", 0)
        start = time.process_time()
        asked = spec.mla_decode_spec(arch=dispatch.arch_of(device), dtype="bf16", kv_lora_rank=512, qk_rope_head_dim=64,
                                     page_size=64, s_q=1, heads=16, causal=True)
        plan = dispatch.plan_for(asked, "auto", device)
        print(1e3 * (time.process_time() - start))
        assert plan.function(1, 2) == 3 and len(gpu.driver) == 1
        gpu.close()


if __name__ == "__main__":
    main()
