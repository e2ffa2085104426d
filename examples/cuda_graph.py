"""One captured graph for all later lengths: capture a decode step, then replay it with others. Needs a GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch

import jitmla

if not torch.cuda.is_available():
    sys.exit("this example needs a GPU")

batch, heads, page_size, max_pages = 4, 128, 64, 16
q = torch.randn(batch, 1, heads, 576, dtype=torch.bfloat16, device="cuda")
kv_cache = torch.randn(batch * max_pages, page_size, 576, dtype=torch.bfloat16, device="cuda")
block_table = torch.arange(batch * max_pages, dtype=torch.int32, device="cuda").view(batch, max_pages)
seq_lens = torch.ones(batch, dtype=torch.int32, device="cuda")
out = torch.empty(batch, 1, heads, 512, dtype=torch.bfloat16, device="cuda")


def step(**options: Any) -> torch.Tensor:
    return jitmla.mla_decode(q, kv_cache, block_table, seq_lens, kv_lora_rank=512, sm_scale=192**-0.5, **options)


with torch.inference_mode():
    step(out=out)  # compiles the kernel, or takes it from the cache, and loads it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(out=out)

    for lengths in ([1, 64, 500, 1024], [0, 65, 501, 7]):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(out, step(backend="reference"), rtol=2e-2, atol=2e-2)
        print(lengths, "agrees with the reference")
