"""The ops around the indexer of DeepSeek Sparse Attention in plain PyTorch: their definitions in readable lines, and
what runs where there is no GPU. Computed in float32, as the kernels do. See the functions of the same names in
jitmla.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import INDEX_DIM, INDEX_PAGE, ROW_BYTES

FP8_MAX = 448.0
FLOOR = 1e-4
FP8 = torch.float8_e4m3fn


def ceil_power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two that is not below x > 0 (float32), from its bits."""
    bits = x.view(torch.int32)
    return (((bits >> 23) + ((bits & 0x7FFFFF) != 0).int()).clamp(1, 254) << 23).view(torch.float32)


def ratio_of(amax: Tensor) -> Tensor:
    """amax / 448, correctly rounded: PyTorch multiplies by a reciprocal where it divides by a number on a GPU."""
    return amax / torch.full_like(amax, FP8_MAX)


def quantised(x: Tensor, scale_mode: str) -> tuple[Tensor, Tensor]:
    """(e4m3 of x / scale, scale) for rows x [..., 128] in float32; the scale keeps a last dimension of 1."""
    ratio = ratio_of(x.abs().amax(-1, keepdim=True).clamp_min(FLOOR))
    scale = ratio if scale_mode == "raw_f32" else ceil_power_of_two(ratio)
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def bf16(x: Tensor) -> Tensor:
    """x rounded to bf16, in float32."""
    return x.bfloat16().float()


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """x [tokens, heads, 128] with its first 64 columns turned by the angles [tokens, 32], rounded to bf16."""
    rope, rest = x[..., :64], x[..., 64:]
    a, b = (rope[..., 0::2], rope[..., 1::2]) if interleave else (rope[..., :32], rope[..., 32:])
    pair = a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]
    new = torch.stack(pair, -1).flatten(-2) if interleave else torch.cat(pair, -1)
    return torch.cat([bf16(new), rest], -1)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, rounded to bf16."""
    for k in range(INDEX_DIM.bit_length() - 1):
        pairs = x.unflatten(-1, (-1, 2, 1 << k))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2).flatten(-3)
    return bf16(x * INDEX_DIM**-0.5)


def indexer_prologue(q: Tensor, k_raw: Tensor, w_raw: Tensor, ln_weight: Tensor, ln_bias: Tensor, positions: Tensor,
                     cos_sin_cache: Tensor, *, rope_interleave: bool, scale_mode: str, hadamard_transform: bool,
                     eps: float, q_fp8: Tensor, k_fp8: Tensor, k_scale: Tensor, weights: Tensor) -> None:
    cos, sin = cos_sin_cache[positions.long()].split(32, -1)
    k = bf16(torch.nn.functional.layer_norm(bf16(k_raw), (INDEX_DIM,), ln_weight.float(), ln_bias.float(), eps))
    rows = turned(torch.cat([q.float(), k[:, None]], 1), cos, sin, rope_interleave)
    codes, scale = quantised(hadamard(rows) if hadamard_transform else rows, scale_mode)
    heads = q.shape[1]
    copy_bytes(q_fp8, codes[:, :heads])
    copy_bytes(k_fp8, codes[:, heads])
    k_scale.copy_(scale[:, heads])
    weights.copy_(w_raw.float() * scale[:, :heads, 0] * (heads * INDEX_DIM) ** -0.5)


def copy_bytes(out: Tensor, x: Tensor) -> None:
    out.view(torch.uint8).copy_(x.contiguous().view(torch.uint8))


def cat_quant_fp8(pe: Tensor, nope: Tensor, *, scale_mode: str, fp8: Tensor, scale: Tensor) -> None:
    codes, factors = quantised(torch.cat([pe, nope], -1).float().reshape(-1, INDEX_DIM), scale_mode)
    copy_bytes(fp8, codes)
    scale.copy_(factors)


def page_parts(cache: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [pages, 64, 128], scales as bytes [pages, 64, 4]) of a pool of the indexer cache, as views."""
    flat = cache.view(torch.uint8)
    pages, step, at = cache.shape[0], cache.stride(0), cache.storage_offset()
    return (flat.as_strided((pages, INDEX_PAGE, INDEX_DIM), (step, INDEX_DIM, 1), at),
            flat.as_strided((pages, INDEX_PAGE, 4), (step, 4, 1), at + INDEX_PAGE * INDEX_DIM))


def indexer_k_scatter(k_fp8: Tensor, k_scale: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    codes, scales = page_parts(cache)
    tokens = torch.nonzero(slot_mapping >= 0).flatten()
    slots = slot_mapping[tokens]
    page, offset = slots // INDEX_PAGE, slots % INDEX_PAGE
    codes[page, offset] = k_fp8.view(torch.uint8)[tokens]
    scales[page, offset] = k_scale.reshape(-1, 1).view(torch.uint8)[tokens]


def indexer_k_gather(cache: Tensor, block_table: Tensor, cu_seq_lens: Tensor, *, k_fp8: Tensor, k_scale: Tensor
                     ) -> None:
    codes, scales = page_parts(cache)
    for r in range(block_table.shape[0]):
        start, end = int(cu_seq_lens[r]), min(int(cu_seq_lens[r + 1]), k_fp8.shape[0])
        token = torch.arange(max(end - start, 0), device=cache.device)
        token = token[token < block_table.shape[1] * INDEX_PAGE]
        page, offset = block_table[r].long()[token // INDEX_PAGE], token % INDEX_PAGE
        token, page, offset = token[page >= 0], page[page >= 0], offset[page >= 0]
        k_fp8.view(torch.uint8)[start + token] = codes[page, offset]
        k_scale[start + token] = scales[page, offset].view(torch.float32).flatten()


def kv_row_pack(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor, *, row: str) -> None:
    tokens = torch.nonzero(slot_mapping >= 0).flatten()
    slots = slot_mapping[tokens]
    latent, rope = kv_c[tokens], k_pe[tokens]
    if row == "fp8":
        tiles = latent.float().unflatten(-1, (-1, 128))
        scale = ceil_power_of_two(ratio_of(tiles.abs().amax(-1, keepdim=True)).clamp_min(FLOOR))
        codes = (tiles / scale).to(FP8).flatten(-2)
        parts = [codes, scale.flatten(1), rope]
    else:
        parts = [latent, rope]
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    size, at = ROW_BYTES[row], cache.storage_offset() * cache.element_size()
    rows = cache.view(torch.uint8).as_strided((cache.shape[0], cache.shape[1], size),
                                              (cache.stride(0) * cache.element_size(), size, 1), at)
    rows[slots // cache.shape[1], slots % cache.shape[1]] = packed


def turned_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (2 i, 2 i + 1) of the last dimension turned by the angles [..., 32 cosines | 32 sines], in float32."""
    cos, sin = angles.split(angles.shape[-1] // 2, -1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def dsa_append(q_pe: Tensor, q_out: Tensor, kv_c: Tensor, k_pe: Tensor, positions: Tensor, cos_sin_cache: Tensor,
               kv_cache: Tensor, slot_mapping: Tensor, k_fp8: Tensor | None, k_scale: Tensor | None,
               index_cache: Tensor | None, index_slot_mapping: Tensor | None, *, row: str) -> None:
    angles = cos_sin_cache[positions.long()]
    q_out.copy_(turned_pairs(q_pe, angles[:, None]))
    kv_row_pack(kv_c, turned_pairs(k_pe, angles), kv_cache, slot_mapping, row=row)
    if k_fp8 is not None and k_scale is not None and index_cache is not None and index_slot_mapping is not None:
        indexer_k_scatter(k_fp8, k_scale, index_cache, index_slot_mapping)


def mqa_row_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor) -> Tensor:
    """[rows, tokens] for q [rows, heads, 128]."""
    found = []
    for i in range(0, q.shape[0], 64):  # bounds the memory
        dots = torch.einsum("ihd,jd->ihj", q[i:i + 64].float(), k.float()).relu_()
        found.append(torch.einsum("ihj,ih->ij", dots, weights[i:i + 64]) * k_scale)
    return torch.cat(found) if found else q.new_empty(0, k.shape[0], dtype=torch.float32)


def fp8_mqa_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, *, store: str,
                   out: Tensor) -> None:
    found = mqa_row_logits(q, k, k_scale, weights)
    column = torch.arange(k.shape[0], device=q.device)
    inside = (column >= ks[:, None]) & (column < ke[:, None])
    if store == "compressed":
        for i in range(q.shape[0]):
            cells = found[i][inside[i]][:out.shape[1]]
            out[i, :len(cells)] = cells
    else:
        out.copy_(found.masked_fill(~inside, -torch.inf) if store == "clean" else found)


def fp8_paged_mqa_logits(q: Tensor, cache: Tensor, weights: Tensor, lens: Tensor, block_table: Tensor, *, out: Tensor
                         ) -> None:
    codes, scales = page_parts(cache)
    next_n = q.shape[1]
    for r, length in enumerate(lens.tolist()):
        n = max(min(length, out.shape[1], block_table.shape[1] * INDEX_PAGE), 0)
        pages = block_table[r, :-(-n // INDEX_PAGE)].long()
        k = codes[pages].flatten(0, 1)[:n].view(FP8)
        k_scale = scales[pages].flatten(0, 1)[:n].contiguous().view(torch.float32).flatten()
        rows = slice(r * next_n, (r + 1) * next_n)
        out[rows, :n] = mqa_row_logits(q[r], k, k_scale, weights[rows])


def topk_indices(logits: Tensor, start: Tensor, end: Tensor, *, out: Tensor) -> None:
    columns, k = logits.shape[1], out.shape[1]
    for r in range(logits.shape[0]):
        first = max(int(start[r]), 0)
        values = logits[r, first:max(min(int(end[r]), columns), first)]
        n = len(values)
        out[r] = -1
        if n <= k:
            out[r, :n] = torch.arange(n, device=out.device)
        else:
            values = torch.where(values.isnan(), -torch.inf, values) + 0.0  # -0 becomes +0
            out[r] = values.sort(descending=True, stable=True)[1][:k].sort()[0]


def row_ends(seq_lens: Tensor, next_n: int) -> Tensor:
    """[requests * next_n]: how far each of a request's rows sees, the last one to the end."""
    draft = torch.arange(next_n, device=seq_lens.device, dtype=torch.int32)
    return (seq_lens[:, None] - next_n + draft + 1).clamp_min(0).flatten()


def local_to_global(topk: Tensor, req_id: Tensor, table: Tensor, *, workspace: bool, page_size: int, stride_factor: int,
                    layer_offset: int, out: Tensor, valid_count: Tensor | None) -> None:
    request = req_id.long()[:, None]
    if workspace:
        found = torch.where(topk >= 0, table.flatten()[request] + topk, -1)
    else:
        index = topk.long() // page_size
        inside = (topk >= 0) & (index < table.shape[1])
        page = table[request, index.clamp(0, table.shape[1] - 1)].long()
        found = torch.where(inside & (page >= 0), page * stride_factor + layer_offset + topk % page_size, -1)
    out.copy_(found)
    if valid_count is not None:
        valid_count.copy_((out >= 0).sum(1))
