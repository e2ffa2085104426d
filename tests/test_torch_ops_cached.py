"""torch.ops.jitmla.* of the ops that write the cache: their schemas say so, fakes, and torch.compile sees the write."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jitmla
from jitmla import torch_ops_cached  # noqa: F401  registers the ops
from jitmla.compat import trtllm
from jitmla.testing_cached import cached_problem, check_cached

from .test_append_latent import E4M3
from .test_append_latent import inputs as append_inputs
from .test_cached_mla import TINY, autodeploy

OPS = torch.ops.jitmla
# torch.compile and opcheck warn about their own internals
pytestmark = pytest.mark.filterwarnings("default")
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def problem(**options):
    """Without NaN: opcheck compares the cache with itself."""
    found = cached_problem(**{"prefill": [(3, 4), (0, 2)], "decode": [7], "heads": 3, **TINY, **options})
    found.kv_cache.nan_to_num_()
    found.before.nan_to_num_()
    return found


def inputs(p):
    return (*p.args, *p.metadata.values(), *p.counts.values(), p.sm_scale, p.kv_scale, None, "auto", "auto")


def test_the_schemas_declare_what_is_written():
    def written(op):
        return [a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    assert {name: written(getattr(OPS, name)) for name in (
        "append_latent", "cached_mla", "cached_mla_out", "cached_mla_with_cache", "cached_mla_with_cache_out")} == {
        "append_latent": ["kv_cache"], "cached_mla": ["kv_cache"], "cached_mla_out": ["kv_cache", "out"],
        "cached_mla_with_cache": ["mla_cache"], "cached_mla_with_cache_out": ["mla_cache", "out"]}
    assert all(r.alias_info is None for op in (OPS.cached_mla, OPS.cached_mla_with_cache)
               for r in op.default._schema.returns)


@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck_append(scaled):
    latent, k_pe, kv_cache, slots = append_inputs(cache=E4M3 if scaled else None)
    kv_cache.view(torch.uint8).zero_()
    # opcheck compares tensors, which torch cannot do for e4m3
    tests = ("test_faketensor",) if scaled else CHECKS
    torch.library.opcheck(OPS.append_latent, (latent, k_pe, kv_cache, slots, torch.ones(1) if scaled else None, "auto"),
                          test_utils=tests)


def test_opcheck_cached():
    p = problem()
    out = torch.zeros(1, 7, 3, 32, dtype=torch.bfloat16)
    torch.library.opcheck(OPS.cached_mla, inputs(p), test_utils=CHECKS)
    torch.library.opcheck(OPS.cached_mla_out, (*inputs(p), out), test_utils=CHECKS)
    torch.library.opcheck(OPS.cached_mla_with_cache, autodeploy(p), test_utils=CHECKS)
    torch.library.opcheck(OPS.cached_mla_with_cache_out, autodeploy(p), {"out": out}, test_utils=CHECKS)


@pytest.mark.parametrize("shape", [{}, dict(prefill=[], decode=[3, 4])])
def test_fake_results_are_like_the_real_ones(shape):
    p = problem(**shape)
    for op, arguments in ((OPS.cached_mla, inputs(p)), (OPS.cached_mla_with_cache, autodeploy(p))):
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (real.shape, real.dtype, real.device,
                                                                        real.stride())


@pytest.mark.parametrize("name", ["cached_mla", "trtllm"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_bitwise_eager(backend, name, given):
    """The write into the cache is seen by what follows in the graph."""
    torch.compiler.reset()

    def step(p, out):
        if name == "cached_mla":
            result = jitmla.cached_mla(*p.args, **p.kwargs, out=out)
        else:
            result = trtllm.triton_cached_mla_with_cache(*autodeploy(p), out=out)
        return (result if out is None or name == "cached_mla" else out) * 2, p.kv_cache.clone()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    first, second = problem(), problem()
    outs = [torch.zeros(1, 7, 3, 32, dtype=torch.bfloat16) if given else None for _ in range(2)]
    got, cache = compiled(first, outs[0])
    expected, _ = step(second, outs[1])
    check_cached(second, expected / 2)
    assert torch.equal(got, expected) and torch.equal(cache, second.kv_cache)
    assert torch.equal(first.kv_cache, second.kv_cache)


def test_compiled_append():
    torch.compiler.reset()

    def step(latent, k_pe, kv_cache, slots):
        jitmla.append_latent(latent * 2, k_pe, kv_cache, slots)
        return kv_cache.sum(-1)

    arguments = append_inputs()
    arguments[2].zero_()
    again = [x.clone() for x in arguments]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(got, step(*again)) and torch.equal(arguments[2], again[2]) and again[2].any()
