"""The key space of DeepSeek Sparse Attention is closed: whatever a layer and its attention launch, keys_for has listed
its Key."""

import pytest
import torch

import jitmla
from jitmla import dispatch, registry
from jitmla.dsa import forward
from jitmla.models import KNOWN, keys_for, specs_for
from jitmla.ops import checks, sparse_mla
from jitmla.testing_dsa import dsa_batch, dsa_layer

OPS = torch.ops.jitmla
MODEL, TOPK, HIDDEN = "deepseek-v3.2", 64, 96
# context requests (new tokens, tokens), tokens of generation requests, new tokens of each of these
PASSES = [([(4, 4), (6, 200)], [33, 1, 300], 1), ([], [33, 24, 300], 1), ([(9, 150)], [], 1), ([(5, 5)], [40, 300], 2),
          ([], [40, 12, 300], 4), ([], [5, 9], 1)]


@pytest.fixture
def met(monkeypatch):
    """The Keys that ops ask of jitmla.dispatch: tensors go for those of a GPU, and launches do nothing."""
    keys = []

    def plan_for(spec, backend, device, **sizes):
        keys.append(registry.choose(spec, backend, sizes).key)
        return dispatch.Plan(keys[-1], device, print)

    monkeypatch.setattr(dispatch, "plan_for", plan_for)
    monkeypatch.setattr(dispatch.Plan, "__call__", lambda *_: None)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(dispatch, "sm_count", lambda device: 132)
    monkeypatch.setattr(checks, "takes_reference", lambda *_: False)
    monkeypatch.setattr(sparse_mla, "_stand_ins", lambda device: (None, None))
    monkeypatch.setattr(sparse_mla.OnGpu, "run", lambda *_: None)
    dispatch.forget()
    yield keys
    dispatch.forget()


@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
@pytest.mark.parametrize("tp, fmt", [(1, "bf16"), (8, "fp8"), (16, "bf16"), (32, "fp8")])
def test_a_layer_meets_no_key_that_is_not_listed(met, tp, fmt, positions):
    """Both ops, on context tokens, generation tokens, and both; with drafts; with fewer tokens than are selected."""
    dims = KNOWN[MODEL]
    layer = dsa_layer("layer", hidden=HIDDEN, heads=dims.num_attention_heads // tp, index_topk=TOPK, q_lora_rank=48,
                      index_heads=dims.index_n_heads, fmt=fmt, pages=16)
    for context, generation, next_n in PASSES:
        batch = dsa_batch(layer, context, generation, next_n=next_n)
        hidden, where = torch.zeros(batch.tokens, HIDDEN, dtype=torch.bfloat16), batch.positions.to(positions)
        with forward(batch):
            q, compressed, k_pe, latent, *indexer = OPS.mla_dsa_proj(hidden, where, layer.key)
            OPS.mla_dsa_attn_inplace(q, compressed, k_pe, latent, indexer, where, layer.key,
                                     hidden.new_empty(batch.tokens, layer.config.heads * 128))
    assert set(met) <= set(keys_for(MODEL, tp=tp))
    assert {key.spec.op for key in met} == {
        "indexer_prologue", "dsa_append", "indexer_k_gather", "fp8_mqa_logits", "fp8_paged_mqa_logits", "topk_indices",
        "local_to_global", "sparse_mla"}
    assert {key.spec["kv_format"] for key in met if key.spec.op == "sparse_mla"} == {fmt}


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16, 32, 64, 128])
def test_closure_of_sparse_mla(met, tp):
    """Decode over rows of either format, and prefill: what they launch is in the list, and nothing else is."""
    heads = KNOWN[MODEL].num_attention_heads // tp
    listed = {key for key in keys_for(MODEL, tp=tp) if key.spec.op == "sparse_mla"}

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    for batch, s_q, topk, page_size in ((1, 1, 2048, 64), (700, 4, 2048, 64), (3, 2, 7, 1), (9, 1, 128, 48)):
        q, indices = empty(batch, s_q, heads, 576), empty(batch, s_q, topk, dtype=torch.int32)
        for cache in (empty(5, page_size, 1, 656, dtype=torch.uint8), empty(5, page_size, 1, 576)):
            jitmla.sparse_mla_decode(q, cache, indices, sm_scale=0.1352, return_lse=True)
    decode = set(met)
    assert {key.spec["kv_format"] for key in decode} == {"fp8", "bf16"}
    met.clear()
    for tokens in (1, 4000):
        jitmla.sparse_mla_prefill(empty(tokens, heads, 576), empty(5000, 1, 576),
                                  empty(tokens, 1, 2048, dtype=torch.int32), sm_scale=0.1352)
    assert {key.spec["kv_format"] for key in met} == {"bf16"} and decode | set(met) == listed


def test_models_without_an_indexer_have_no_sparse_attention():
    for name, dims in KNOWN.items():
        ops = {spec.op for spec in specs_for(name, tp=8, arch="sm_90a")}
        assert ("sparse_mla" in ops) == bool(dims.index_n_heads)
