"""torch.ops.jitmla.*: schemas that tell what is written, fakes, and torch.compile without graph breaks."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import jitmla
from jitmla import torch_ops  # noqa: F401  registers the ops
from jitmla.errors import JitmlaError
from jitmla.testing import mla_decode_oracle, mla_decode_problem

OPS = torch.ops.jitmla
# torch.compile and opcheck warn about their own internals
pytestmark = pytest.mark.filterwarnings("default")


def inputs(problem, backend="auto"):
    q, q_pe = problem.q if isinstance(problem.q, tuple) else (problem.q, None)
    return (q, q_pe, problem.kv_cache, problem.block_table, problem.seq_lens, problem.sinks, problem.kv_lora_rank,
            problem.sm_scale, problem.causal, backend)


def small(lengths=(20, 0, 3), **options):
    options = {"heads": 4, "s_q": 2, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "page_size": 16, **options}
    return mla_decode_problem(list(lengths), **options)


def outputs(problem):
    return torch.zeros(problem.out_shape, dtype=problem.dtype), torch.zeros(problem.out_shape[:3])


def test_the_schema_declares_what_is_written():
    def written(op):
        return [a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    assert written(OPS.mla_decode_out) == ["out", "lse"] and not OPS.mla_decode_out.default._schema.returns
    assert written(OPS.mla_decode) == [] and len(OPS.mla_decode.default._schema.returns) == 2
    assert all(r.alias_info is None for r in OPS.mla_decode.default._schema.returns)


@pytest.mark.parametrize("query", ["joined", "pair"])
@pytest.mark.parametrize("sinks", [None, "mixed"])
def test_opcheck(query, sinks):
    """PyTorch's own checks: schema, fake against real, and dispatch; on the data that the oracle likes as well."""
    problem = small(query=query, sinks=sinks, poison=False)
    # there is no backward, so no autograd registration to check
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.mla_decode, inputs(problem), test_utils=tests)
    torch.library.opcheck(OPS.mla_decode_out, (*inputs(problem), *outputs(problem)), test_utils=tests)


def test_both_ops_do_what_the_front_end_does():
    problem = small(sinks="finite")
    out, lse = OPS.mla_decode(*inputs(problem))
    mla_decode_oracle(problem).check(out, lse)
    given = outputs(problem)
    assert OPS.mla_decode_out(*inputs(problem), *given) is None
    assert torch.equal(given[0], out) and torch.equal(given[1], lse)


def test_errors_are_those_of_the_front_end():
    problem = small()
    with pytest.raises(JitmlaError, match="backend='sm90' on cpu tensors"):
        OPS.mla_decode(*inputs(problem, backend="sm90"))


@pytest.mark.parametrize("query", ["joined", "pair"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fake_results_are_like_the_real_ones(dtype, query):
    problem = small(dtype=dtype, query=query)
    real = OPS.mla_decode(*inputs(problem))
    with FakeTensorMode() as mode:
        fake = OPS.mla_decode(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs(problem)))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def layer(q, kv_cache, block_table, seq_lens, sinks, rank):
    """What an engine compiles: work before and after."""
    q = (q[0] * 2, q[1] * 2) if isinstance(q, tuple) else q * 2
    out, lse = jitmla.mla_decode(q, kv_cache, block_table, seq_lens, kv_lora_rank=rank, sm_scale=0.1, sinks=sinks,
                                 return_lse=True)
    return out + 1, lse


@pytest.mark.parametrize("query", ["joined", "pair"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_bitwise_eager(backend, query):
    torch.compiler.reset()
    problem = small(query=query, sinks="finite")
    arguments = (*problem.args, problem.sinks, problem.kv_lora_rank)
    got = torch.compile(layer, fullgraph=True, backend=backend)(*arguments)
    expected = layer(*arguments)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_with_given_outputs(backend):
    """The writes are seen by what follows in the graph, and by the caller."""
    torch.compiler.reset()
    problem = small()

    def step(out, lse, *args):
        jitmla.mla_decode(*args, kv_lora_rank=64, sm_scale=0.1, out=out, lse=lse)
        return out * 2, lse.clone()

    got, expected = outputs(problem), outputs(problem)
    doubled, copied = torch.compile(step, fullgraph=True, backend=backend)(*got, *problem.args)
    step(*expected, *problem.args)
    assert expected[0].any() and torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(doubled, expected[0] * 2) and torch.equal(copied, expected[1])


@pytest.mark.parametrize("given", ["out", "lse"])
def test_compiled_with_one_given_output(given):
    torch.compiler.reset()
    problem = small()

    def step(out, *args):
        return jitmla.mla_decode(*args, kv_lora_rank=64, sm_scale=0.1, return_lse=True, **{given: out})

    index = ["out", "lse"].index(given)
    mine = outputs(problem)[index]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(mine, *problem.args)
    expected = jitmla.mla_decode(*problem.args, kv_lora_rank=64, sm_scale=0.1, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and torch.equal(mine, expected[index])


def test_one_graph_for_all_batches_and_lengths():
    """Dynamic shapes: a batch that grows does not compile anew.

    12 heads, because torch.compile takes sizes that happen to be equal in the first call for the same size."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([20, 0, 3], [5, 5], [70, 1, 2, 3, 4], [16] * 9):
        problem = small(lengths, heads=12, sinks="finite")
        arguments = (*problem.args, problem.sinks, problem.kv_lora_rank)
        got, expected = compiled(*arguments), layer(*arguments)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert counter.frame_count == 1
