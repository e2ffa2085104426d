"""What tests of DSA layers share: small random layers, batches of any make-up, and an oracle of the second op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dsa import Batch, Config, Context, Generation, Layer, Weights
from .ops.sparse_reference import unpack_rows
from .testing_sparse import pack_rows

PAGE, INDEX_BYTES = 64, 132
FP8 = torch.float8_e4m3fn
NEAR = 1e-3


@dataclass
class DsaBatch(Batch):
    """A batch with the positions of its tokens."""

    positions: Tensor | None = None


def dsa_layer(key: str, *, hidden: int, heads: int, index_topk: int, index_heads: int = 64,
              q_lora_rank: int | None = 1536, fmt: str = "fp8", pages: int = 64, indexer: bool = True,
              device: torch.device | str = "cpu", seed: int = 0, sm_scale: float = 0.1352, positions: int = 4096,
              **options: Any) -> Layer:
    """A layer with random weights and angles for so many positions, and caches of `pages` pages of 64 tokens full of
    rows of earlier tokens."""
    rng = torch.Generator(device=device).manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=rng, device=device, dtype=torch.float32)
        return (x * shape[-1] ** -0.5).bfloat16()

    config = Config(heads=heads, sm_scale=sm_scale, q_lora_rank=q_lora_rank, index_topk=index_topk,
                    index_heads=index_heads, **options)
    rank = q_lora_rank or 0
    ones = [1 + 0.1 * torch.randn(n, generator=rng, device=device) for n in (rank, 512, 128)]
    parts = dict(index_q_proj=matrix(index_heads * 128, rank or hidden),
                 index_kw_proj=matrix(128 + index_heads, hidden), index_k_norm=ones[2],
                 index_k_bias=0.1 * torch.randn(128, generator=rng, device=device))
    weights = Weights(
        kv_a_proj=matrix(rank + 576, hidden), kv_a_norm=ones[1].bfloat16(), q_proj=matrix(heads * 192, rank or hidden),
        w_uk=matrix(heads, 512, 128).transpose(1, 2).contiguous(),
        w_uv=matrix(heads, 128, 512).transpose(1, 2).contiguous(),
        q_a_norm=ones[0].bfloat16() if rank else None, **(parts if indexer else {}))
    angle = torch.arange(positions, device=device)[:, None] * 10000.0 ** (-torch.arange(32, device=device) / 32)
    rows = torch.randn(pages * PAGE, 576, generator=rng, device=device)
    packed = pack_rows(rows[:, :512], rows[:, 512:])[0] if fmt == "fp8" else rows.bfloat16()
    index_cache = torch.empty(pages, PAGE, 1, INDEX_BYTES, dtype=torch.uint8, device=device)
    flat = index_cache.view(pages, -1)
    flat[:, :PAGE * 128] = torch.randn(pages, PAGE * 128, generator=rng, device=device).to(FP8).view(torch.uint8)
    scales = torch.exp2(torch.randint(-3, 3, (pages, PAGE), generator=rng, device=device).float())
    flat[:, PAGE * 128:] = scales.view(torch.uint8)
    return Layer(key, config, weights, torch.cat([angle.cos(), angle.sin()], 1).float(),
                 packed.view(pages, PAGE, 1, -1), index_cache if indexer else None)


def dsa_batch(layer: Layer, context: Sequence[tuple[int, int]], generation: Sequence[int], *, next_n: int = 1,
              seed: int = 0, max_context_len: int | None = None) -> DsaBatch:
    """A batch with these (new tokens, tokens) of context requests and tokens of generation requests, on pages at
    random. The two caches use different pages."""
    device, pages = layer.kv_cache.device, layer.kv_cache.shape[0]
    lengths = [k for _, k in context] + list(generation)
    width = max([-(-k // PAGE) for k in lengths], default=0) + 1

    def table(salt: int) -> Tensor:
        free = torch.randperm(pages, generator=torch.Generator().manual_seed(2 * seed + salt)).tolist()
        found = [[free.pop() for _ in range(-(-k // PAGE))] for k in lengths]
        padded = [row + [-1] * (width - len(row)) for row in found]
        return torch.tensor(padded, dtype=torch.int32).view(len(lengths), width)

    news = [q for q, _ in context] + [next_n] * len(generation)
    request = torch.tensor([r for r, n in enumerate(news) for _ in range(n)], dtype=torch.int64)
    position = torch.tensor([p for k, n in zip(lengths, news, strict=True) for p in range(k - n, k)], dtype=torch.int64)
    tables = [table(salt) for salt in (0, 1)]
    slots = [(t[request, position // PAGE].long() * PAGE + position % PAGE).to(device) for t in tables]
    main, index = (t.to(device) for t in tables)
    split = len(context)
    past = None
    if context:
        past = Context(tuple(q for q, _ in context), tuple(k for _, k in context), main[:split], index[:split])
    following = Generation(torch.tensor(list(generation), dtype=torch.int32).to(device), main[split:], index[split:],
                           max_context_len or width * PAGE, next_n) if generation else None
    return DsaBatch(*slots, past, following, positions=position.to(device))


def checked(selected: Tensor, logits: Tensor, order: Tensor, k: int) -> Tensor:
    """`selected`; raises AssertionError unless it is the first k of `order`, but for ties."""
    last, near = logits[order[k - 1]], NEAR * logits.abs().max()
    assert len(selected) == k == len(selected.unique()) and bool((selected >= 0).all()), "not so many positions"
    assert bool((logits[selected] >= last - near).all()), "a position that is not among the largest"
    left = torch.ones_like(logits, dtype=torch.bool)
    left[selected] = False
    assert bool((logits[left] <= last + near).all()), "one of the largest is missing"
    return selected


def dsa_oracle(layer: Layer, batch: DsaBatch, hidden: Tensor, positions: Tensor, selected: Tensor | None = None
               ) -> Tensor:
    """What the two ops give for these tokens, [tokens, heads * 128] float64; the caches are left as they are. From the
    first op's results on, all is computed here, row by row, in float64.

    selected: batch.topk of a call to judge, [tokens, index_topk]. It has to be right but for logits that are closer to
    the last one than NEAR of the largest, and is then what is attended: in float32 such positions change places.
    """
    c, w = layer.config, layer.weights
    q, compressed, k_pe, _, q_fp8, k_fp8, k_scale, weights = torch.ops.jitmla.mla_dsa_proj(hidden, positions, layer.key)
    angles = layer.cos_sin[positions].double()

    def rotated(x: Tensor, at: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(at[..., :32], at[..., 32:])).flatten(-2)

    rows = layer.kv_cache.flatten(0, 2)
    exact = rows.double() if rows.dtype == torch.bfloat16 else unpack_rows(rows).double()
    new = rotated(k_pe, angles).bfloat16()
    exact[batch.slot_mapping] = (torch.cat([compressed, new], 1).double() if rows.dtype == torch.bfloat16
                                 else pack_rows(compressed.float(), new)[1])
    assert layer.index_cache is not None
    pages = layer.index_cache.flatten(1)
    codes = pages[:, :PAGE * 128].contiguous().view(FP8).double().view(-1, 128)
    keys = codes * pages[:, PAGE * 128:].contiguous().view(torch.float32).double().view(-1, 1)
    keys[batch.index_slot_mapping] = k_fp8.double() * k_scale.double()

    heads = q.double().view(-1, c.heads, 192)
    if c.llama_4_scaling is not None:
        beta, original = c.llama_4_scaling
        heads = heads * (1 + beta * torch.log(torch.floor((positions + 1) / original) + 1))[:, None, None].double()
    absorbed = torch.einsum("thd,hdc->thc", heads[..., :128], w.w_uk.double())
    query = torch.cat([absorbed, rotated(heads[..., 128:], angles[:, None])], -1)
    tables = [torch.cat([getattr(part, name) for part in (batch.context, batch.generation) if part is not None])
              for name in ("block_table", "index_block_table")]
    news = [*(batch.context.q_lens if batch.context else ())]
    if batch.generation:
        news += [batch.generation.next_n] * batch.generation.seq_lens.shape[0]
    out = torch.zeros(hidden.shape[0], c.heads, c.v_head_dim, dtype=torch.float64, device=hidden.device)
    token = 0
    for r, n in enumerate(news):
        for _ in range(n):
            seen = torch.arange(int(positions[token]) + 1, device=hidden.device)
            at, index_at = (table[r].long()[seen // PAGE] * PAGE + seen % PAGE for table in tables)
            if len(seen) > c.index_topk:
                dots = torch.einsum("hd,kd->kh", q_fp8[token].double(), keys[index_at]).relu()
                logits = dots @ weights[token].double()
                order = logits.sort(descending=True, stable=True)[1]
                if selected is not None:
                    order = checked(selected[token].long(), logits, order, c.index_topk)
                at = at[order[:c.index_topk]]
            attention = torch.softmax(c.sm_scale * query[token] @ exact[at].T, -1)
            out[token] = torch.einsum("hc,hcv->hv", attention @ exact[at, :512], w.w_uv.double())
            token += 1
    return out.flatten(1)
