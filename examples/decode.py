"""The smallest use of jitmla: one decode step on a GPU, or on the CPU where there is none."""

from __future__ import annotations

import torch

import jitmla

device = "cuda" if torch.cuda.is_available() else "cpu"
batch, heads, page_size, max_pages = 3, 16, 64, 4

# the query, with W_UK absorbed: 512 latent columns, then 64 rotary ones
q = torch.randn(batch, 1, heads, 512 + 64, dtype=torch.bfloat16, device=device)
# the cache: pages of latent rows; block_table says which pages a request has, in which order
kv_cache = torch.randn(batch * max_pages, page_size, 512 + 64, dtype=torch.bfloat16, device=device)
block_table = torch.randperm(batch * max_pages, dtype=torch.int32, device=device).view(batch, max_pages)
seq_lens = torch.tensor([200, 1, 64], dtype=torch.int32, device=device)

with torch.inference_mode():
    out, lse = jitmla.mla_decode(q, kv_cache, block_table, seq_lens, kv_lora_rank=512, sm_scale=192**-0.5,
                                 return_lse=True)

print("out", list(out.shape), out.dtype, "on", out.device)
print("lse", list(lse.shape), lse.dtype)
print("events", {kind: count for kind, count in jitmla.stats().items() if count})
