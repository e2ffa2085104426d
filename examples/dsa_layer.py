"""A tiny layer with DeepSeek Sparse Attention, a prompt and then token by token, on the CPU with the reference backend.

    python examples/dsa_layer.py

Two requests share two caches: rows of 656 bytes for attention, and the indexer's keys. A piecewise CUDA graph would be
cut at the second of the layer's two ops.
"""

import torch

from jitmla import dsa

HIDDEN, HEADS, TOPK, PAGE, PAGES = 64, 2, 8, 64, 4
rng = torch.Generator().manual_seed(0)


def matrix(*shape):
    return (torch.randn(shape, generator=rng) * shape[-1] ** -0.5).bfloat16()


config = dsa.Config(heads=HEADS, sm_scale=192**-0.5, q_lora_rank=32, index_heads=32, index_topk=TOPK)
weights = dsa.Weights(
    kv_a_proj=matrix(32 + 512 + 64, HIDDEN), q_a_norm=torch.ones(32).bfloat16(), kv_a_norm=torch.ones(512).bfloat16(),
    q_proj=matrix(HEADS * 192, 32), w_uk=matrix(HEADS, 128, 512), w_uv=matrix(HEADS, 512, 128),
    index_q_proj=matrix(32 * 128, 32), index_kw_proj=matrix(128 + 32, HIDDEN), index_k_norm=torch.ones(128),
    index_k_bias=torch.zeros(128))
angles = torch.arange(256)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
layer = dsa.Layer("layers.0", config, weights, torch.cat([angles.cos(), angles.sin()], 1),
                  kv_cache=torch.zeros(PAGES, PAGE, 1, 656, dtype=torch.uint8),
                  index_cache=torch.zeros(PAGES, PAGE, 1, 132, dtype=torch.uint8))
table = torch.tensor([[2], [0]], dtype=torch.int32)  # a page for each request, the same in both caches


def attention(hidden, positions, batch):
    """What a model does in each layer; [tokens, heads * 128]."""
    q, compressed_kv, k_pe, latent, *indexer = torch.ops.jitmla.mla_dsa_proj(hidden, positions, layer.key)
    output = hidden.new_empty(hidden.shape[0], HEADS * config.v_head_dim)
    with dsa.forward(batch):
        torch.ops.jitmla.mla_dsa_attn_inplace(q, compressed_kv, k_pe, latent, indexer, positions, layer.key, output)
    return output


def slots(requests, positions):
    return table[requests, positions // PAGE].long() * PAGE + positions % PAGE


with torch.inference_mode():
    # the prompts, 20 and 12 tokens, padded to 40 rows as for a captured graph
    lengths = [20, 12]
    requests = torch.tensor([0] * 20 + [1] * 12)
    positions = torch.cat([torch.arange(n) for n in lengths])
    where = slots(requests, positions)
    hidden = torch.randn(40, HIDDEN, generator=rng).bfloat16()
    batch = dsa.Batch(where, where, context=dsa.Context(tuple(lengths), tuple(lengths), table, table))
    output = attention(hidden, torch.cat([positions, torch.zeros(8, dtype=torch.int64)]), batch)
    print(f"prompts: output {list(output.shape)}, {int((output != 0).any(1).sum())} rows of it are not zero")

    for step in range(3):
        lengths = [n + 1 for n in lengths]
        positions = torch.tensor(lengths) - 1
        where = slots(torch.arange(2), positions)
        generation = dsa.Generation(torch.tensor(lengths, dtype=torch.int32), table, table, max_context_len=PAGE)
        batch = dsa.Batch(where, where, generation=generation)
        output = attention(torch.randn(2, HIDDEN, generator=rng).bfloat16(), positions, batch)
        print(f"step {step}: request 0 attends to {sorted(batch.topk[0].tolist())} of {lengths[0]} positions")
