"""Prefill over a paged cache against float64, on any device: both forms, any chunking."""

from __future__ import annotations

import torch

import jitmla
from jitmla.testing import UNIT_ROUNDOFF, mla_decode_problem
from jitmla.testing_memory import guarded
from jitmla.testing_prefill import exact_attention, offsets

WAYS = (("mha", 65536), ("mha", 1), ("mha", 1000), ("absorbed", 1))  # form, chunk_tokens


def check_paged(new, prefixes, *, heads, nope, v_dim, rank, device, page=64, rope=64,
                dtype=torch.bfloat16):
    """Attention in float64 to keys and values expanded in float64 is what all ways come to.

    The logits are gentle: keys that are rounded to 16 bits move sharp ones by more than any bound of this kind. The
    absorbed form also rounds its latent output, before the projection that lets columns of it cancel.
    """
    base = mla_decode_problem([n + p for n, p in zip(new, prefixes, strict=True)], heads=1, kv_lora_rank=rank,
                              page_size=page, device=device, dtype=dtype)
    rng = torch.Generator(device=device).manual_seed(1)
    q = torch.full((sum(new) + 1, heads, nope + rope), float("nan"), dtype=dtype, device=device)
    q[:-1] = torch.randn((sum(new), heads, nope + rope), generator=rng, device=device).to(dtype)
    w = (torch.randn((heads * (nope + v_dim), rank), generator=rng, device=device) / 4).to(dtype)
    cu, scale, results = offsets(new, device), 0.2, {}
    for form, chunk in WAYS:
        out = guarded((sum(new) + 1, heads, v_dim), dtype, device)
        lse = guarded((sum(new) + 1, heads), torch.float32, device)
        jitmla.mla_prefill_paged(q, base.kv_cache, base.block_table, base.seq_lens, cu, w, max_seqlen_q=max(new),
                                 max_prefix=max(prefixes), v_head_dim=v_dim, sm_scale=scale, form=form,
                                 chunk_tokens=chunk, out=out.tensor, lse=lse.tensor)
        assert out.intact() and lse.intact(), "written outside of out or lse"
        assert out.tensor[-1].isnan().all() and lse.tensor[-1].isnan().all(), "rows behind the last request written"
        results[form, chunk] = out.tensor[:-1], lse.tensor[:-1]
    unit = UNIT_ROUNDOFF[dtype]
    weight = w.double().view(heads, nope + v_dim, rank)
    for b in range(len(new)):
        i = torch.arange(base.lengths[b], device=device)
        rows = base.kv_cache[base.block_table[b].long()[i // page], i % page].double()
        expanded = torch.einsum("jr,hcr->jhc", rows[:, :rank], weight)
        k = torch.cat([expanded[..., :nope], rows[:, None, rank:].expand(-1, heads, -1)], -1)
        mine = slice(cu[b], cu[b + 1])
        exact, exact_lse, spread, _ = exact_attention(q[mine], k, expanded[..., nope:], scale, True)
        latent, *_ = exact_attention(q[mine], k, rows[:, None, :rank].expand(-1, heads, -1), scale, True)
        cancelling = torch.einsum("ihr,hvr->ihv", latent.abs(), weight[:, nope:].abs())
        for (form, chunk), (out, lse) in results.items():
            allowed = 2.0**-6 * spread + 1e-3 + (2.0**-8 * cancelling if form == "absorbed" else 0)
            worst = float(((out[mine].double() - exact).abs() / allowed).nan_to_num(nan=float("inf")).max())
            assert worst <= 1, f"{form} in chunks of {chunk}: {worst:.2f} of what is allowed in request {b}"
            assert torch.allclose(lse[mine].double(), exact_lse, atol=2e-2)
        whole, whole_lse = (x[mine].double() for x in results[WAYS[0]])
        for way in WAYS[1:3]:  # the same keys: what differs is how weights and the results of chunks are rounded
            out, lse = results[way]
            worst = float(((out[mine] - whole).abs() / (unit * (whole.abs() + 1.5 * spread) + 1e-4)).max())
            assert worst <= 1, f"{way}: {worst:.2f} of what may differ between chunkings in request {b}"
            assert torch.allclose(lse[mine].double(), whole_lse, atol=1e-4)
