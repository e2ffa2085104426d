"""torch.ops.jitmla.* of the output path: what they say they write, fakes with the real strides, torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import jitmla
from jitmla import torch_ops_o_proj  # noqa: F401  registers the ops
from jitmla.errors import JitmlaError
from jitmla.layouts import SCALE_MODES
from jitmla.testing_o_proj import FP8, product_problem, quant_problem

OPS = torch.ops.jitmla
# torch.compile and opcheck warn about their own internals
pytestmark = pytest.mark.filterwarnings("default")
# No backward, so no autograd registration to check. test_schema compares with arithmetic that PyTorch lacks for e4m3;
# test_inputs_are_left_alone stands in for it.
TESTS = ("test_faketensor", "test_aot_dispatch_dynamic")


def bits(x):
    return x.view(torch.uint8) if x.dtype == FP8 else x


def quant_inputs(tokens=5, mode="pow2_f32", flat=False):
    problem = quant_problem(tokens, heads=8, groups=2)
    o = problem.o.flatten(1) if flat else problem.o
    return o, problem.positions, problem.cos_sin_cache, 2, 448, 64, 128, mode, False, "auto"


def bmm_inputs(tokens=5):
    return *product_problem(tokens, groups=2, columns=128, k=2048).args, "auto"


def chain_inputs(tokens=5):
    w = product_problem(1, groups=2, columns=128, k=2048)
    return *quant_inputs(tokens)[:3], w.b, w.b_scale, 448, 64, "pow2_f32", False, "auto"


CALLS = {"inv_rope_fp8_quant": quant_inputs, "fp8_bmm": bmm_inputs, "o_a_proj": chain_inputs}


def outputs(name, tokens=5):
    if name == "inv_rope_fp8_quant":
        return torch.zeros(2, tokens, 2048, dtype=FP8), torch.zeros(2, 16, (tokens + 3) // 4 * 4)
    shape = (2, tokens, 128) if name == "fp8_bmm" else (tokens, 2, 128)
    return (torch.zeros(shape, dtype=torch.bfloat16),)


@pytest.mark.parametrize("name, written, returned", [("inv_rope_fp8_quant", ["o_fp8", "o_scale"], 2),
                                                     ("fp8_bmm", ["out"], 1), ("o_a_proj", ["out"], 1)])
def test_schemas_declare_what_is_written(name, written, returned):
    def writes(op):
        return [a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    op, out = getattr(OPS, name), getattr(OPS, f"{name}_out")
    assert writes(out) == written and not out.default._schema.returns
    assert writes(op) == [] and len(op.default._schema.returns) == returned
    assert all(r.alias_info is None for r in op.default._schema.returns)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name), CALLS[name](), test_utils=TESTS)
    torch.library.opcheck(getattr(OPS, f"{name}_out"), (*CALLS[name](), *outputs(name)), test_utils=TESTS)


@pytest.mark.parametrize("name", CALLS)
def test_both_forms_do_the_same(name):
    results = getattr(OPS, name)(*CALLS[name]())
    given = outputs(name)
    assert getattr(OPS, f"{name}_out")(*CALLS[name](), *given) is None
    for a, b in zip(results if isinstance(results, tuple) else (results,), given, strict=True):
        assert bits(a).any() and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("tokens", [0, 1, 5, 8])
@pytest.mark.parametrize("inputs", [*((n, {}) for n in CALLS), *(("inv_rope_fp8_quant", {"mode": m, "flat": f})
                                                                for m in SCALE_MODES for f in (False, True))], ids=str)
def test_fakes_have_the_padded_strides_of_the_real_ones(inputs, tokens):
    name, options = inputs
    arguments = CALLS[name](tokens, **options)
    real = getattr(OPS, name)(*arguments)
    with FakeTensorMode() as mode:
        fake = getattr(OPS, name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
    for a, b in pairs:
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_errors_are_those_of_the_front_end():
    with pytest.raises(JitmlaError, match="backend='sm90' on cpu"):
        OPS.fp8_bmm(*bmm_inputs()[:-1], "sm90")


def layer(o, positions, table, w, w_scale):
    """What an engine compiles: work before and after."""
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(o * 2, positions, table, n_groups=2, scale_mode="pow2_f32")
    parts = jitmla.fp8_bmm(o_fp8, o_scale, w, w_scale)
    return parts.transpose(0, 1).flatten(1) + 1, jitmla.o_a_proj(o * 2, positions, table, w, w_scale).flatten(1) + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_bitwise_eager(backend):
    torch.compiler.reset()
    arguments = chain_inputs()[:5]
    got = torch.compile(layer, fullgraph=True, backend=backend)(*arguments)
    expected = layer(*arguments)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]) and torch.equal(got[0], got[1])


def test_compiled_with_given_outputs():
    """The writes are seen by what follows in the graph, and by the caller."""
    torch.compiler.reset()

    def step(o_fp8, z, out, *args):
        _, o_scale = jitmla.inv_rope_fp8_quant(*args[:3], n_groups=2, scale_mode="pow2_f32", o_fp8=o_fp8)
        jitmla.fp8_bmm(o_fp8, o_scale, *args[3:], out=z)
        jitmla.o_a_proj(*args, out=out)
        return z * 2, out * 2

    def made():
        return outputs("inv_rope_fp8_quant")[0], *outputs("fp8_bmm"), *outputs("o_a_proj")

    mine, expected, arguments = made(), made(), chain_inputs()[:5]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*mine, *arguments)
    again = step(*expected, *arguments)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip((*mine, *got), (*expected, *again), strict=True))
    assert mine[1].any() and torch.equal(mine[1].transpose(0, 1), mine[2])


def test_one_graph_for_all_numbers_of_tokens():
    """Dynamic shapes: a batch that grows does not compile anew."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 7, 33, 64):
        arguments = chain_inputs(tokens)[:5]
        got, expected = compiled(*arguments), layer(*arguments)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_left_alone(name):
    arguments = CALLS[name]()
    before = [bits(x).clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    getattr(OPS, name)(*arguments)
    getattr(OPS, f"{name}_out")(*arguments, *outputs(name))
    for x, y in zip(arguments, before, strict=True):
        assert torch.equal(bits(x), y) if isinstance(x, torch.Tensor) else x == y
