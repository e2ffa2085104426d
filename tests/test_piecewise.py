"""Cutting FX graphs at the second op of a DSA layer: where the cuts are, how often, and that nothing is compiled
twice."""

import pytest
import torch
from torch import fx

from jitmla import dsa
from jitmla.engines import piecewise
from jitmla.testing_dsa import dsa_batch, dsa_layer

OPS = torch.ops.jitmla
HIDDEN, HEADS, LAYERS = 96, 2, 3
pytestmark = pytest.mark.filterwarnings("default")  # torch.compile warns about its own internals


def toy(layers):
    """Hidden states through `layers`, each with a residual."""
    mixers = [torch.randn(HIDDEN, HEADS * 128, generator=torch.Generator().manual_seed(i)).bfloat16() / 20
              for i in range(len(layers))]

    def model(hidden, positions):
        for layer, mix in zip(layers, mixers, strict=True):
            q, compressed, k_pe, latent, q_fp8, k_fp8, k_scale, weights = OPS.mla_dsa_proj(hidden, positions, layer.key)
            output = hidden.new_empty(hidden.shape[0], HEADS * 128)
            OPS.mla_dsa_attn_inplace(q, compressed, k_pe, latent, [q_fp8, k_fp8, k_scale, weights], positions,
                                     layer.key, output)
            hidden = hidden + torch.nn.functional.linear(output, mix)
        return hidden

    return model


@pytest.fixture
def layers():
    return [dsa_layer(f"layer {i}", hidden=HIDDEN, heads=HEADS, index_topk=16, index_heads=32, q_lora_rank=32, seed=i)
            for i in range(LAYERS)]


def pad(batch, tokens, seed):
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
    positions = torch.zeros(tokens, dtype=torch.int64)
    positions[:batch.tokens] = batch.positions
    return hidden, positions


def test_three_layers_are_four_spans_and_three_cuts(layers):
    torch.compiler.reset()
    backend = piecewise.Backend(sizes=[])
    frames = []

    def count(graph, examples):
        frames.append(graph)
        return backend(graph, examples)

    model = toy(layers)
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    passes = [([(3, 10), (4, 40)], [33, 5], 16), ([], [20] * 9, 11), ([(6, 6)], [], 8), ([], [50, 2], 11)]
    for seed, (context, generation, tokens) in enumerate(passes):
        batch = dsa_batch(layers[0], context, generation, seed=seed)
        hidden, positions = pad(batch, tokens, seed)
        kept = [(x, x.clone()) for layer in layers for x in (layer.kv_cache, layer.index_cache)]
        with torch.inference_mode(), dsa.forward(batch):
            got = compiled(hidden, positions)
            after = [x.clone() for x, _ in kept]
            for x, value in kept:
                x.copy_(value)
            expected = model(hidden, positions)
        assert torch.equal(got, expected)
        assert all(torch.equal(a, x) for a, (x, _) in zip(after, kept, strict=True))
    assert len(frames) == 1, "compiled again for another number of tokens or another batch"
    (pieces,) = backend.pieces
    assert (len(pieces.spans), len(pieces.cuts)) == (LAYERS + 1, LAYERS)
    for name in pieces.cuts:
        nodes = [n for n in getattr(pieces.module, name).graph.nodes if n.op == "call_function"]
        assert [piecewise.op_name(n) for n in nodes] == ["mla_dsa_attn_inplace"]


@pytest.mark.parametrize("dynamic", [True, False])
def test_inputs_that_grow_with_the_tokens(layers, dynamic):
    """Hidden states and positions do; the mixers, whose width is a symbol as well, do not."""
    torch.compiler.reset()
    found = []

    def record(graph, examples):
        found.append([(tuple(x.shape), grows) for x, grows in zip(examples, piecewise.growing(graph, examples),
                                                                  strict=True) if isinstance(x, torch.Tensor)])
        return graph

    batch = dsa_batch(layers[0], [(3, 10)], [33, 5])
    with torch.inference_mode(), dsa.forward(batch):
        torch.compile(toy(layers), backend=record, fullgraph=True, dynamic=dynamic)(*pad(batch, 16, 0))
    assert found == [[((16, HIDDEN), True), ((16,), True)] + [((HIDDEN, HEADS * 128), False)] * LAYERS]


def test_names_of_ops_however_they_are_called():
    graph = fx.Graph()
    x = graph.placeholder("x")
    packet = graph.call_function(OPS.mla_dsa_attn_inplace, (x,))
    overload = graph.call_function(OPS.mla_dsa_attn_inplace.default, (x,))
    wrapped = graph.call_function(torch.ops.higher_order.auto_functionalized_v2, (OPS.mla_dsa_attn_inplace.default, x))
    other = graph.call_function(torch.relu, (x,))
    method = graph.call_method("relu", (x,))
    assert [piecewise.op_name(n) for n in (packet, overload, wrapped)] == ["mla_dsa_attn_inplace"] * 3
    assert piecewise.op_name(x) is None and piecewise.op_name(method) is None
    assert piecewise.op_name(other) != "mla_dsa_attn_inplace"


def test_a_graph_without_cuts_is_one_span():
    pieces = piecewise.split(fx.symbolic_trace(lambda x: torch.relu(x) + 1))
    assert (len(pieces.spans), pieces.cuts) == (1, ())
    assert torch.equal(pieces.module(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 3.0]))


def test_a_cut_op_of_ones_own():
    def model(x):
        return torch.sin(torch.cumsum(torch.cos(x), 0)) * 2

    pieces = piecewise.split(fx.symbolic_trace(model), boundaries=["cumsum"])
    assert len(pieces.cuts) == 0, "a function that is no custom op has no such name"
    traced = fx.symbolic_trace(lambda x: torch.sin(torch.ops.aten.cumsum.default(torch.cos(x), 0)) * 2)
    pieces = piecewise.split(traced, boundaries=["cumsum"])
    assert (len(pieces.spans), len(pieces.cuts)) == (2, 1)
    x = torch.randn(4)
    assert torch.equal(pieces.module(x), model(x))
