"""torch.ops.jitmla.* of sparse MLA: what they say they write, fakes with the real strides, torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import jitmla
from jitmla import torch_ops_sparse  # noqa: F401  registers the ops
from jitmla.testing_sparse import sparse_mla_problem

OPS = torch.ops.jitmla
pytestmark = pytest.mark.filterwarnings("default")  # torch.compile and opcheck warn about their own internals


def decode_inputs(batch=3):
    p = sparse_mla_problem(batch=batch, s_q=2, topk=10, rows=100, heads=4, invalid=0.1, lengths=[7] * batch,
                           sinks="finite")
    return *p.args, p.topk_length, p.attn_sink, p.sm_scale, "auto"


def prefill_inputs(tokens=3):
    p = sparse_mla_problem(batch=tokens, topk=10, rows=100, heads=4, fmt="bf16")
    return *p.prefill, None, None, p.sm_scale, "auto"


def outputs(name, inputs):
    fake = torch_ops_sparse._fake_decode if "decode" in name else torch_ops_sparse._fake_prefill
    return tuple(x.zero_() for x in fake(inputs[0])[:2 if "decode" in name else 1])


CALLS = {"sparse_mla_decode": decode_inputs, "sparse_mla_prefill": prefill_inputs}


@pytest.mark.parametrize("name, written, returned", [("sparse_mla_decode", ["out", "lse"], (2, 0)),
                                                     ("sparse_mla_prefill", ["out"], (3, 2))])
def test_schemas_declare_what_is_written(name, written, returned):
    out = getattr(OPS, f"{name}_out")
    for op, writes, results in ((getattr(OPS, name), [], returned[0]), (out, written, returned[1])):
        schema = op.default._schema
        assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == writes
        assert len(schema.returns) == results and all(r.alias_info is None for r in schema.returns)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    inputs = CALLS[name]()
    torch.library.opcheck(getattr(OPS, name).default, inputs)
    torch.library.opcheck(getattr(OPS, f"{name}_out").default, (*inputs, *outputs(name, inputs)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_fakes_are_like_the_real_results(name, n):
    inputs = CALLS[name](n)
    real = getattr(OPS, name)(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = getattr(OPS, name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.storage_offset()) == (b.shape, b.dtype, b.storage_offset())
        assert n == 0 or a.stride() == b.stride()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    decode, prefill = decode_inputs(), prefill_inputs()

    def layer(q, kv, indices, length, q2, kv2, indices2, out2):
        out, lse = jitmla.sparse_mla_decode(q * 2, kv, indices, topk_length=length, sm_scale=0.1, return_lse=True)
        given = torch.empty_like(out)
        jitmla.sparse_mla_decode(q, kv, indices, topk_length=length, sm_scale=0.1, out=given)
        rest = jitmla.sparse_mla_prefill(q2, kv2, indices2, sm_scale=0.1)
        again = jitmla.sparse_mla_prefill(q2, kv2, indices2, sm_scale=0.1, out=out2)
        return out + 1, lse, given, *rest, *again[1:]

    inputs = *decode[:4], *prefill[:3], torch.zeros(3, 4, 512, dtype=torch.bfloat16)
    expected = layer(*inputs)
    written = inputs[-1].clone()
    inputs[-1].zero_()
    got = torch.compile(layer, fullgraph=True, backend=counter)(*inputs)
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and torch.equal(inputs[-1], written)
