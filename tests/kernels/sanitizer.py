"""A few small mla_decode calls for compute-sanitizer, by hand (it is slow: a minute or two each):

    export JITMLA_CACHE_DIR=...  PYTORCH_NO_CUDA_MEMORY_CACHING=1      (so that bounds are those of each tensor)
    compute-sanitizer --tool memcheck  python -m tests.kernels.sanitizer
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitizer
    compute-sanitizer --tool initcheck python -m tests.kernels.sanitizer

Results are checked as well. The shapes meet all kernels, whole and split requests, the causal limit, sinks, several
row tiles, small and large pages. JITMLA_CACHE_DIR should hold what `python -m tests.keysets` puts there.
"""

from __future__ import annotations

import torch

import jitmla
from jitmla.testing import mla_decode_oracle, mla_decode_problem
from jitmla.testing_features import featured

CASES = [
    dict(lengths=[0, 1, 65, 300], heads=8),
    dict(lengths=[700, 64], heads=16, sinks="mixed"),
    dict(lengths=[3, 200], heads=8, s_q=2),
    dict(lengths=[0, 130, 1000], heads=63, sinks="finite"),
    dict(lengths=[700, 2], heads=32),
    dict(lengths=[2, 700], heads=128, s_q=2),
    dict(lengths=[40] * 140, heads=16),
    dict(lengths=[70] * 70 + [900], heads=128),
    dict(lengths=[100, 17, 0], heads=128, kv_lora_rank=256, page_size=32),
    dict(lengths=[100, 17, 0], heads=16, kv_lora_rank=256, page_size=32),
    dict(lengths=[300, 15], heads=20, page_size=16, s_q=2, row_pad=8, page_pad=16, q_pad=8, query="pair"),
]


# (problem, features) for the portable kernel: its Keys are those of PORTABLE_ON_GPU
PORTABLE = [
    (dict(lengths=[0, 1, 65, 300], heads=16, page_size=7, sinks="mixed"), {}),
    (dict(lengths=[700, 2], heads=128, s_q=2, page_size=100), {}),
    (dict(lengths=[3, 200, 0], heads=8, s_q=3), dict(q_lens=[2, 3, 0], extra_tokens=1)),
    (dict(lengths=[3000, 64], heads=16), dict(batch_invariant=True)),
    (dict(lengths=[130, 40], heads=16, page_size=7), dict(kv="e4m3")),
    (dict(lengths=[130, 40], heads=64, s_q=2, page_size=24), dict(kv="e4m3", q="e4m3")),
    (dict(lengths=[130, 40], heads=12, page_size=3, dtype=torch.float16), dict(split=True)),
]


def main() -> None:
    for case in CASES:
        problem = mla_decode_problem(device="cuda", **case)
        out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True, backend="sm90")
        torch.cuda.synchronize()
        print(case, mla_decode_oracle(problem).check(out, lse), flush=True)
    for case, features in PORTABLE:
        made = featured(mla_decode_problem(device="cuda", **case), **features)
        out, lse = jitmla.mla_decode(*made.args, **made.kwargs, return_lse=True, backend="portable")
        torch.cuda.synchronize()
        print(case, features, made.check(out, lse), flush=True)


if __name__ == "__main__":
    main()
