"""The two ops of a DSA layer on a GPU: capture and replay, piecewise and whole, with batches of changing make-up.

All kernels are those of tests/keysets.py, so these tests run from a prewarmed cache on a machine without the compiler.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jitmla import dsa, events
from jitmla.engines import piecewise
from jitmla.errors import InvalidArgument
from jitmla.testing_dsa import dsa_batch, dsa_layer, dsa_oracle

from ..support.marks import ON_HOPPER

pytestmark = [
    *ON_HOPPER,
    pytest.mark.filterwarnings("default"),  # torch.compile warns about its own internals
]

OPS = torch.ops.jitmla
HIDDEN, HEADS, TOPK = 256, 16, 512


@pytest.fixture
def layers(request):
    name = request.node.name
    return [dsa_layer(f"{name} {i}", hidden=HIDDEN, heads=HEADS, index_topk=TOPK, index_heads=64, q_lora_rank=128,
                      seed=i, pages=256, device="cuda") for i in range(3)]


def padded(batch, tokens, seed):
    rng = torch.Generator(device="cuda").manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=rng, device="cuda").bfloat16()
    positions = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    positions[:batch.tokens] = batch.positions
    return hidden, positions


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def second(layer, given, positions, output):
    OPS.mla_dsa_attn_inplace(*given[:4], list(given[4:]), positions, layer.key, output)
    return output


@pytest.mark.parametrize("context, generation, next_n", [
    ([(40, 900), (3, 3)], [700, 1, 513], 1), ([], [1000, 600, 512], 2), ([], [1000, 600, 30], 4), ([(5, 600)], [], 1)])
def test_against_an_independent_oracle(layers, context, generation, next_n):
    layer = layers[0]
    batch = dsa_batch(layer, context, generation, next_n=next_n)
    hidden, positions = padded(batch, batch.tokens, 1)
    with dsa.forward(batch):
        got = second(layer, OPS.mla_dsa_proj(hidden, positions, layer.key), positions,
                     torch.full((batch.tokens, HEADS * 128), torch.nan, dtype=torch.bfloat16, device="cuda"))
    expected = dsa_oracle(layer, batch, hidden, positions, batch.topk)
    assert got.isfinite().all() and (got.double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("options", [{"q_lora_rank": None}, {"llama_4_scaling": (0.5, 200)}],
                         ids=lambda options: next(iter(options)))
def test_options_of_a_layer(options):
    """Against the oracle, and then a layer without an indexer that takes the same selection."""
    names = [f"{next(iter(options))} {i}" for i in range(2)]
    sizes = {"hidden": HIDDEN, "heads": HEADS, "index_topk": TOPK, "q_lora_rank": 128, "device": "cuda", **options}
    layer, after = dsa_layer(names[0], **sizes), dsa_layer(names[1], **sizes, indexer=False, seed=1)
    batch = dsa_batch(layer, [(40, 900), (3, 3)], [700, 1, 513])
    hidden, positions = padded(batch, batch.tokens, 1)
    outputs = torch.full((2, batch.tokens, HEADS * 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    with dsa.forward(batch):
        second(layer, OPS.mla_dsa_proj(hidden, positions, layer.key), positions, outputs[0])
        selected = batch.topk.clone()
        second(after, OPS.mla_proj(hidden, positions, after.key), positions, outputs[1])
    expected = dsa_oracle(layer, batch, hidden, positions, selected)
    assert (outputs[0].double() - expected).norm() / expected.norm() < 2e-2
    assert outputs[1].isfinite().all() and torch.equal(batch.topk, selected)


def test_the_first_op_in_a_shared_pool(layers):
    """Replayed with new inputs, the bits of eager calls; each layer's results are whole when the next one's graph has
    not run yet."""
    hidden, positions = padded(dsa_batch(layers[0], [(64, 64)], []), 64, 1)
    pool, graphs = torch.cuda.graph_pool_handle(), []
    for layer in layers[:2]:
        OPS.mla_dsa_proj(hidden, positions, layer.key)
        graph = torch.cuda.CUDAGraph()
        compiles = events.stats()["compile"]
        with torch.cuda.graph(graph, pool=pool):
            results = OPS.mla_dsa_proj(hidden, positions, layer.key)
        assert events.stats()["compile"] == compiles
        graphs.append((layer, graph, results))
    for seed in range(3):
        hidden.copy_(torch.randn(64, HIDDEN, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
        positions.copy_(torch.randint(900, (64,), device="cuda"))
        for layer, graph, results in graphs:
            graph.replay()
            assert same(results, OPS.mla_dsa_proj(hidden, positions, layer.key))


def test_a_stashed_result_is_overwritten(layers):
    """What the test above rules out: a result that is kept beyond the capture, in memory that the pool gives away."""
    hidden, positions = padded(dsa_batch(layers[0], [(64, 64)], []), 64, 1)
    pool, stashed, graphs = torch.cuda.graph_pool_handle(), [], []
    for layer in layers[:2]:
        OPS.mla_dsa_proj(hidden, positions, layer.key)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            results = OPS.mla_dsa_proj(hidden, positions, layer.key)
        stashed.append(piecewise._without_memory(results))
        graphs.append(graph)
        del results
    for graph in graphs:
        graph.replay()
    assert not same(stashed[0], OPS.mla_dsa_proj(hidden, positions, layers[0].key))


def test_decode_in_one_graph(layers):
    """Both ops of two layers captured with static buffers, replayed with other lengths, tables and drafts in the
    cache."""
    batch = dsa_batch(layers[0], [], [1000, 600, 30, 513], max_context_len=2048)
    batch.topk = torch.empty(4, TOPK, dtype=torch.int32, device="cuda")
    hidden, positions = padded(batch, 4, 1)
    output = torch.zeros(2, 4, HEADS * 128, dtype=torch.bfloat16, device="cuda")
    selected = torch.zeros(2, 4, TOPK, dtype=torch.int32, device="cuda")

    def step():
        for layer, into, kept in zip(layers[:2], output, selected, strict=True):
            second(layer, OPS.mla_dsa_proj(hidden, positions, layer.key), positions, into)
            kept.copy_(batch.topk)

    with dsa.forward(batch):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    for seed, lengths in enumerate(([5, 1000, 700, 1], [1000, 1, 600, 600], [2, 514, 900, 64])):
        other = dsa_batch(layers[0], [], lengths, seed=seed)
        fresh, at = padded(other, 4, seed)
        width = other.generation.block_table.shape[1]
        for name in ("block_table", "index_block_table"):
            table = getattr(batch.generation, name)
            table.fill_(-1)[:, :width] = getattr(other.generation, name)[:, :table.shape[1]]
        for into, value in ((batch.generation.seq_lens, other.generation.seq_lens), (hidden, fresh), (positions, at),
                            (batch.slot_mapping, other.slot_mapping),
                            (batch.index_slot_mapping, other.index_slot_mapping)):
            into.copy_(value)
        output.fill_(torch.nan)
        selected.fill_(-7)
        graph.replay()
        for layer, got, kept in zip(layers[:2], output, selected, strict=True):
            exact = dsa_oracle(layer, other, fresh, at, kept)
            assert got.isfinite().all() and (got.double() - exact).norm() / exact.norm() < 2e-2


def test_replays_have_the_same_bits(layers):
    """Kernels that start before those ahead of them end read nothing that is not written yet: with more requests than
    a wave holds, and each replay's results poisoned before."""
    batch = dsa_batch(layers[0], [], [1000 - 7 * i for i in range(12)], max_context_len=1024)
    batch.topk = torch.empty(batch.tokens, TOPK, dtype=torch.int32, device="cuda")
    hidden, positions = padded(batch, batch.tokens, 1)
    outputs = torch.zeros(len(layers), batch.tokens, HEADS * 128, dtype=torch.bfloat16, device="cuda")

    def step():
        following = hidden
        for layer, output in zip(layers, outputs, strict=True):
            second(layer, OPS.mla_dsa_proj(following, positions, layer.key), positions, output)
            following = hidden + output[:, :HIDDEN]

    caches = [x for layer in layers for x in (layer.kv_cache, layer.index_cache)]
    with dsa.forward(batch):
        step()
        expected = [x.clone() for x in (outputs, batch.topk, *caches)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    for _ in range(100):
        outputs.fill_(torch.nan)
        batch.topk.fill_(-7)
        graph.replay()
        assert same([outputs, batch.topk, *caches], expected)


def test_context_tokens_are_not_captured(layers):
    batch = dsa_batch(layers[0], [(3, 700)], [600])
    hidden, positions = padded(batch, 4, 1)
    given = OPS.mla_dsa_proj(hidden, positions, layers[0].key)
    output = torch.zeros(4, HEADS * 128, dtype=torch.bfloat16, device="cuda")
    with dsa.forward(batch):
        second(layers[0], given, positions, output)
        with pytest.raises(InvalidArgument, match="3 context tokens"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            output.add_(0)
            second(layers[0], given, positions, output)
    torch.cuda.synchronize()


def test_piecewise(layers):
    """A model of three layers: replays with other batches, of other numbers of tokens and make-up, have the bits of
    eager passes, and neither compile nor capture again."""
    mixers = [torch.randn(HIDDEN, HEADS * 128, device="cuda", dtype=torch.bfloat16) / 20 for _ in layers]

    def model(hidden, positions):
        for layer, mix in zip(layers, mixers, strict=True):
            given = OPS.mla_dsa_proj(hidden, positions, layer.key)
            output = hidden.new_empty(hidden.shape[0], HEADS * 128)
            OPS.mla_dsa_attn_inplace(given[0], given[1], given[2], given[3], [given[4], given[5], given[6], given[7]],
                                     positions, layer.key, output)
            hidden = hidden + torch.nn.functional.linear(output, mix)
        return hidden

    torch.compiler.reset()
    backend = piecewise.Backend(sizes=[32, 64])
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    passes = [([(3, 600), (4, 900), (20, 20)], [700, 5], 32), ([(9, 700)], [600, 30] + [9] * 7, 32),
              ([(40, 40)], [513], 64), ([], [600, 700], 32), ([(6, 6)], [900], 11), ([(41, 800)], [513, 5], 64)]
    for seed, (context, generation, tokens) in enumerate(passes):
        batch = dsa_batch(layers[0], context, generation, seed=seed)
        hidden, positions = padded(batch, tokens, seed)
        hidden[batch.tokens:] = torch.nan
        kept = [(x, x.clone()) for layer in layers for x in (layer.kv_cache, layer.index_cache)]
        with torch.inference_mode():
            with dsa.forward(batch):
                got = compiled(hidden, positions).clone()
            after = [x.clone() for x, _ in kept]
            for x, value in kept:
                x.copy_(value)
            with dsa.forward(dataclasses.replace(batch, topk=None)):
                expected = model(hidden, positions)
        n = batch.tokens
        assert torch.equal(got[:n], expected[:n])
        assert all(torch.equal(a, x) for a, (x, _) in zip(after, kept, strict=True))
    assert len(backend.pieces) == 1 and len(backend.pieces[0].spans) == 4
    (program,) = backend._programs
    assert all(set(span.captured) == {32, 64} for span in program.spans.values())
