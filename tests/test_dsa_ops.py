"""The two ops of a DSA layer on the reference backend: shapes, opcheck, padding, what they leave alone, batch
make-up."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jitmla import dsa
from jitmla.dsa.batch import plan_chunks
from jitmla.errors import InvalidArgument
from jitmla.testing_dsa import dsa_batch, dsa_layer, dsa_oracle

OPS = torch.ops.jitmla
HIDDEN, HEADS, TOPK = 96, 3, 24
pytestmark = pytest.mark.filterwarnings("default")  # opcheck warns about its own internals


def small(key="layer", **options):
    return dsa_layer(key, hidden=HIDDEN, heads=HEADS, index_topk=TOPK, index_heads=32, q_lora_rank=48, **options)


def inputs(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=rng).bfloat16(), torch.randint(0, 60, (tokens,), generator=rng)


def run(layer, batch, hidden, positions):
    """Both ops; the output is poisoned beforehand."""
    with dsa.forward(batch):
        q, compressed, k_pe, latent, *indexer = OPS.mla_dsa_proj(hidden, positions, layer.key)
        output = torch.full((hidden.shape[0], HEADS * 128), torch.nan, dtype=torch.bfloat16)
        OPS.mla_dsa_attn_inplace(q, compressed, k_pe, latent, indexer, positions, layer.key, output)
    return output


def contents(layer):
    return layer.kv_cache.clone(), layer.index_cache.clone()


def restore(layer, kept):
    layer.kv_cache.copy_(kept[0]), layer.index_cache.copy_(kept[1])


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_shapes_and_fakes_of_the_first_op(tokens):
    layer = small()
    hidden, positions = inputs(tokens)
    real = OPS.mla_dsa_proj(hidden, positions, layer.key)
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    assert [(list(x.shape), x.dtype) for x in real] == [
        ([tokens, HEADS * 192], bf16), ([tokens, 512], bf16), ([tokens, 64], bf16), ([tokens, 576], bf16),
        ([tokens, 32, 128], fp8), ([tokens, 128], fp8), ([tokens, 1], torch.float32), ([tokens, 32], torch.float32)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = OPS.mla_dsa_proj(mode.from_tensor(hidden), mode.from_tensor(positions), layer.key)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.storage_offset()) == (b.shape, b.stride(), b.dtype, b.storage_offset())
    memory = {x.untyped_storage().data_ptr() for x in (*real, hidden)}
    assert len(memory) == 9, "results share memory"
    assert torch.equal(real[3], torch.cat(real[1:3], -1))


def test_opcheck():
    layer = small()
    batch = dsa_batch(layer, [(3, 10)], [5, 30], seed=1)
    hidden, positions = inputs(8)
    torch.library.opcheck(OPS.mla_dsa_proj.default, (hidden, positions, layer.key),
                          test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"))
    q, compressed, k_pe, latent, *indexer = OPS.mla_dsa_proj(hidden, positions, layer.key)
    output = torch.zeros(8, HEADS * 128, dtype=torch.bfloat16)
    with dsa.forward(batch):
        torch.library.opcheck(OPS.mla_dsa_attn_inplace.default,
                              (q, compressed, k_pe, latent, indexer, positions, layer.key, output),
                              test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_schemas():
    def written(op):
        return [a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    assert written(OPS.mla_dsa_proj) == written(OPS.mla_proj) == [] and written(OPS.mla_dsa_attn_inplace) == ["output"]
    counts = [len(op.default._schema.returns) for op in (OPS.mla_dsa_proj, OPS.mla_proj, OPS.mla_dsa_attn_inplace)]
    assert counts == [8, 4, 0]


def test_the_second_op_writes_its_output_alone():
    layer = small()
    batch = dsa_batch(layer, [(3, 10)], [5, 30], seed=1)
    hidden, positions = inputs(8)
    q, compressed, k_pe, latent, *indexer = given = OPS.mla_dsa_proj(hidden, positions, layer.key)
    before = [x.clone() for x in given]
    with dsa.forward(batch):
        OPS.mla_dsa_attn_inplace(q, compressed, k_pe, latent, indexer, positions, layer.key,
                                 torch.zeros(8, HEADS * 128, dtype=torch.bfloat16))
    for a, b in zip(before, given, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_the_first_op_touches_no_cache():
    layer = small()
    before = contents(layer)
    OPS.mla_dsa_proj(*inputs(9), layer.key)
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.kv_cache, layer.index_cache), strict=True))


@pytest.mark.parametrize("fmt", ["fp8", "bf16"])
@pytest.mark.parametrize("context, generation, next_n", [
    ([(4, 4), (6, 40)], [33, 1, 60], 1), ([], [33, 24, 60], 1), ([(9, 50)], [], 1), ([(5, 5)], [40, 12], 2),
    ([], [40, 12, 30], 4)])
def test_against_an_independent_oracle(fmt, context, generation, next_n):
    layer = small(fmt=fmt)
    batch = dsa_batch(layer, context, generation, next_n=next_n, seed=3)
    hidden, _ = inputs(batch.tokens, seed=4)
    positions = batch.positions
    expected = dsa_oracle(layer, batch, hidden, positions)
    got = run(layer, batch, hidden, positions)
    error = (got.double() - expected).norm() / expected.norm()
    assert got.isfinite().all() and error < 2e-2, error


def test_padded_rows():
    """Whatever padded rows hold, the others have the same bits; their output is zero; the caches change at the
    slots."""
    layer = small()
    batch = dsa_batch(layer, [(20, 30)], [5, 40, 17] + [9] * 14, seed=2)
    n = batch.tokens
    hidden, _ = inputs(64)
    positions = torch.zeros(64, dtype=torch.int64)
    positions[:n] = batch.positions
    kept = contents(layer)
    expected = run(layer, batch, hidden[:n].contiguous(), positions[:n])
    after = contents(layer)
    restore(layer, kept)
    hidden[n:] = torch.nan
    got = run(layer, dataclasses.replace(batch, topk=None), hidden, positions)
    assert torch.equal(got[:n], expected) and torch.equal(got[n:], torch.zeros_like(got[n:]))
    assert all(torch.equal(a, b) for a, b in zip(after, contents(layer), strict=True))
    rows = layer.kv_cache.view(-1, layer.kv_cache.shape[-1])
    changed = (rows != kept[0].view_as(rows)).any(-1).nonzero().flatten()
    assert set(changed.tolist()) <= set(batch.slot_mapping.tolist()) and len(changed)


@pytest.mark.parametrize("tokens", [0, 5])
def test_empty_batches(tokens):
    layer = small()
    batch = dsa_batch(layer, [], [])
    output = run(layer, batch, *inputs(tokens))
    assert torch.equal(output, torch.zeros_like(output))


def test_results_do_not_depend_on_the_chunks():
    layer = small()
    batch = dsa_batch(layer, [(4, 30), (0, 9), (17, 60), (3, 31)], [], seed=5)
    hidden, _ = inputs(batch.tokens)
    kept, results = contents(layer), []
    for most in (2**29, 4 * 60 * 5, 4 * 21 * 90, 1):
        restore(layer, kept)
        layer.config = dataclasses.replace(layer.config, max_logits_bytes=most)
        results.append(run(layer, dataclasses.replace(batch, topk=None), hidden, batch.positions))
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_chunks_cover_every_row_once_and_keep_the_bound():
    q_lens, kv_lens = (4, 0, 17, 3, 900, 1), (30, 9, 60, 31, 1000, 1)
    for most in (1, 400, 4 * 21 * 90, 4 * 60 * 1000, 10**9):
        rows, requests = [], []
        for which, own in plan_chunks(q_lens, kv_lens, most):
            size = 4 * len(own) * sum(kv_lens[r] for r in which)
            assert size <= most or len(own) == 1
            rows += own
            requests += which
            first = sum(q_lens[:which.start])
            assert first <= own.start and own.stop <= sum(q_lens[:which.stop])
        assert rows == list(range(sum(q_lens)))


def test_a_layer_without_an_indexer_takes_the_top_k_of_the_one_before():
    first, second = small("first"), small("second", indexer=False)
    batch = dsa_batch(first, [(4, 40)], [33], seed=3)
    hidden, _ = inputs(batch.tokens)
    with dsa.forward(batch):
        for layer in (first, second):
            op = OPS.mla_dsa_proj if layer.has_indexer else OPS.mla_proj
            q, compressed, k_pe, latent, *indexer = op(hidden, batch.positions, layer.key)
            assert len(indexer) == (4 if layer.has_indexer else 0)
            output = torch.full((batch.tokens, HEADS * 128), torch.nan, dtype=torch.bfloat16)
            OPS.mla_dsa_attn_inplace(q, compressed, k_pe, latent, indexer, batch.positions, layer.key, output)
            assert output.isfinite().all()


def test_without_q_lora():
    layer = dsa_layer("lite", hidden=HIDDEN, heads=HEADS, index_topk=TOPK, index_heads=32, q_lora_rank=None)
    batch = dsa_batch(layer, [(4, 40)], [33], seed=3)
    hidden, _ = inputs(batch.tokens)
    expected = dsa_oracle(layer, batch, hidden, batch.positions)
    got = run(layer, batch, hidden, batch.positions)
    assert (got.double() - expected).norm() / expected.norm() < 2e-2


def test_llama_4_scaling():
    layer = small(llama_4_scaling=(0.5, 8))
    batch = dsa_batch(layer, [(12, 40)], [33], seed=3)
    hidden, _ = inputs(batch.tokens)
    expected = dsa_oracle(layer, batch, hidden, batch.positions)
    kept = contents(layer)
    got = run(layer, batch, hidden, batch.positions)
    assert (got.double() - expected).norm() / expected.norm() < 2e-2
    restore(layer, kept)
    layer.config = dataclasses.replace(layer.config, llama_4_scaling=None)
    other = run(layer, dataclasses.replace(batch, topk=None), hidden, batch.positions)
    assert (other.double() - expected).norm() / expected.norm() > 2e-2, "it makes no difference"


def test_what_is_refused():
    layer = small()
    batch = dsa_batch(layer, [(3, 10)], [5], seed=1)
    hidden, positions = inputs(4)
    given = OPS.mla_dsa_proj(hidden, positions, layer.key)
    output = torch.zeros(4, HEADS * 128, dtype=torch.bfloat16)
    call = (*given[:4], list(given[4:]), positions, layer.key, output)
    with pytest.raises(InvalidArgument, match="without a batch"):
        OPS.mla_dsa_attn_inplace(*call)
    with pytest.raises(InvalidArgument, match="no such layer"):
        OPS.mla_dsa_proj(hidden, positions, "another")
    with pytest.raises(InvalidArgument, match="one layer for each key"):
        small()
    with dsa.forward(dsa_batch(layer, [(6, 10)], [])), pytest.raises(InvalidArgument, match="tokens are missing"):
        OPS.mla_dsa_attn_inplace(*call)
    layer.config = dataclasses.replace(layer.config, debug=True)
    batch.generation.block_table[0, 0] = layer.kv_cache.shape[0]
    with dsa.forward(batch), pytest.raises(InvalidArgument, match="no such page"):
        OPS.mla_dsa_attn_inplace(*call)
    with pytest.raises(InvalidArgument, match="slots of shape"):
        dataclasses.replace(batch, slot_mapping=batch.slot_mapping[:2])
    with pytest.raises(InvalidArgument, match="q_lens"):
        dataclasses.replace(batch.context, q_lens=(11,))


def test_a_layer_is_held_by_its_owner_alone():
    layer = small("gone")
    hidden, positions = inputs(2)
    OPS.mla_dsa_proj(hidden, positions, "gone")
    del layer
    with pytest.raises(InvalidArgument, match="no such layer"):
        OPS.mla_dsa_proj(hidden, positions, "gone")


