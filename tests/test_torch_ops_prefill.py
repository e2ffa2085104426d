"""torch.ops.jitmla.* of prefill: what they say they write, fakes with the real strides, torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jitmla
from jitmla import torch_ops_prefill  # noqa: F401  registers the ops
from jitmla.errors import JitmlaError
from jitmla.testing import mla_decode_problem
from jitmla.testing_prefill import offsets, prefill_problem

OPS = torch.ops.jitmla
# torch.compile and opcheck warn about their own internals
pytestmark = pytest.mark.filterwarnings("default")
# no backward, so no autograd registration to check
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def prefill_inputs(tokens=5, keys="pair"):
    p = prefill_problem([tokens, 3], [7, 2], heads=2, qk_head_dim=80, v_head_dim=24, keys=keys, pad=0)
    k, k_pe = p.k if isinstance(p.k, tuple) else (p.k, None)
    return p.q, k, k_pe, p.v, p.cu_seqlens_q, p.cu_seqlens_k, tokens, 7, 0.1, True, "auto"


def merge_inputs(tokens=5):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn((tokens, 2, 8), generator=rng).bfloat16() for _ in range(2))
    return a, torch.randn((2, tokens), generator=rng).t(), b, torch.randn((tokens, 2), generator=rng), "auto"


def gather_inputs():
    p = mla_decode_problem([40, 3], heads=1, poison=False)
    return p.kv_cache, p.block_table, torch.tensor([7, 0], dtype=torch.int32), offsets([5, 3], "cpu"), "auto"


def outputs(name):
    if name == "mla_prefill":
        return torch.zeros(8, 2, 24, dtype=torch.bfloat16), torch.zeros(8, 2)
    if name == "gather_latent":
        return (torch.zeros(9, 576, dtype=torch.bfloat16),)
    return torch.zeros(5, 2, 8, dtype=torch.bfloat16), torch.zeros(5, 2)


CALLS = {"mla_prefill": prefill_inputs, "merge_attn_states": merge_inputs, "gather_latent": gather_inputs}
FUNCTIONAL = ("mla_prefill", "merge_attn_states")


@pytest.mark.parametrize("name", CALLS)
def test_schemas_declare_what_is_written(name):
    def writes(op):
        return [a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    out = getattr(OPS, f"{name}_out")
    assert writes(out) == (["out"] if name == "gather_latent" else ["out", "lse"])
    assert not out.default._schema.returns
    if name in FUNCTIONAL:
        op = getattr(OPS, name)
        assert writes(op) == [] and all(r.alias_info is None for r in op.default._schema.returns)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    if name in FUNCTIONAL:
        torch.library.opcheck(getattr(OPS, name), CALLS[name](), test_utils=TESTS)
    torch.library.opcheck(getattr(OPS, f"{name}_out"), (*CALLS[name](), *outputs(name)), test_utils=TESTS)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_both_forms_do_the_same(name):
    results, given = getattr(OPS, name)(*CALLS[name]()), outputs(name)
    assert getattr(OPS, f"{name}_out")(*CALLS[name](), *given) is None
    for a, b in zip(results, given, strict=True):
        assert b.any() and torch.equal(a, b)


@pytest.mark.parametrize("name, options", [
    *(("mla_prefill", {"keys": keys, "tokens": n}) for keys in ("joined", "pair", "heads") for n in (0, 1, 5)),
    *(("merge_attn_states", {"tokens": n}) for n in (0, 5))], ids=str)
def test_fakes_have_the_strides_of_the_real_ones(name, options):
    arguments = CALLS[name](**options)
    real = getattr(OPS, name)(*arguments)
    with FakeTensorMode() as mode:
        fake = getattr(OPS, name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.stride() == b.stride() or not b.numel()  # strides of nothing mean nothing


def test_errors_are_those_of_the_front_end():
    with pytest.raises(JitmlaError, match="backend='sm90' on cpu"):
        OPS.mla_prefill(*prefill_inputs()[:-1], "sm90")


def step(q, k, k_pe, v, cu_q, cu_k, out):
    """What an engine compiles: a suffix and a chunk, merged; work before and after."""
    options = dict(max_seqlen_q=5, max_seqlen_k=7, sm_scale=0.1)
    own, own_lse = jitmla.mla_prefill(q * 2, (k, k_pe), v, cu_q, cu_k, **options, return_lse=True)
    _, lse = jitmla.mla_prefill(q * 2, (k, k_pe), v, cu_q, cu_k, **options, causal=False, out=out, return_lse=True)
    merged, merged_lse = jitmla.merge_attn_states(own, own_lse, out, lse)
    return merged.flatten(1) + 1, merged_lse


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_bitwise_eager(backend):
    torch.compiler.reset()
    arguments, mine, expected = prefill_inputs()[:6], outputs("mla_prefill")[0], outputs("mla_prefill")[0]
    got = torch.compile(step, fullgraph=True, backend=backend)(*arguments, mine)
    again = step(*arguments, expected)
    assert mine.any() and torch.equal(mine, expected)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


def test_compiled_gather():
    torch.compiler.reset()

    def rows(cache, table, starts, cu_rows, out):
        return jitmla.gather_latent(cache, table, starts, cu_rows, out=out) * 2

    (mine,), (expected,) = outputs("gather_latent"), outputs("gather_latent")
    got = torch.compile(rows, fullgraph=True, backend="aot_eager")(*gather_inputs()[:-1], mine)
    assert torch.equal(got, rows(*gather_inputs()[:-1], expected)) and torch.equal(mine, expected) and mine.any()
