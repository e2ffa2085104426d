"""mla_decode over e4m3 caches on the native kernels against float64: each variant, page sizes, MTP, splits, scales."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import jitmla
from jitmla import tune
from jitmla.spec import mla_decode_spec
from jitmla.testing import E4M3_DOTS, mla_decode_problem
from jitmla.testing_features import featured

from ..keysets import E4M3, covering_choices
from ..support.marks import ON_HOPPER
from ..support.replay import BATCH, MOST, over_ragged_batches

pytestmark = ON_HOPPER
EDGES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 700, 4096]
CHOICES = [c for c in covering_choices("mla_decode") if c.template.name == "sm90_fp8"]
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.bfloat16}


def posed(spec, lengths, **options):
    """A problem that `spec` serves: as many heads as its bucket holds, two query tokens where it is causal."""
    s_q = 2 if spec["causal"] else 1
    heads = {8: 8, 16: 16, 32: 32, 64: 64, 512: 256}[spec["rows"]] // 2 // (2 if spec["causal"] else 1) + 1
    heads = min(heads, 128)
    which = {"q": "e4m3" if spec["dtype"] == "e4m3" else "plain", "descale": options.pop("descale", "tensor")}
    plain = mla_decode_problem(lengths, heads=heads, s_q=s_q, page_size=spec["page_size"] or 7,
                               kv_lora_rank=spec["kv_lora_rank"], dtype=NAMES[spec["dtype"]], device="cuda", **options)
    case = featured(plain, kv="e4m3", scales=(0.02, 0.02) if plain.inputs == "usual" else (0.1, 0.1), **which)
    met = mla_decode_spec(arch=spec["arch"], dtype=spec["dtype"], kv_dtype="e4m3", kv_lora_rank=spec["kv_lora_rank"],
                          qk_rope_head_dim=64, page_size=plain.kv_cache.shape[1], s_q=s_q, heads=heads, causal=True)
    assert met == spec
    return case


def run(case):
    return jitmla.mla_decode(*case.args, **case.kwargs, return_lse=True)


def check(case, out, lse):
    return case.check(out, lse, E4M3_DOTS if "q_descale" in case.kwargs else 0.0)


def same(a, b):
    return all(bool((x.view(torch.uint8) == y.view(torch.uint8)).all()) for x, y in zip(a, b, strict=True))


@pytest.fixture
def only(request):
    """The Spec of a Choice, which runs it whatever the sizes of a call."""
    jitmla.use_tunings(tune.naming(request.param.spec, request.param.name))
    yield request.param.spec
    jitmla.use_tunings({})


@pytest.mark.parametrize("only", CHOICES, ids=lambda c: f"{c.variant.name} {c.spec}", indirect=True)
def test_every_variant(only):
    spec = only
    for options in ({"lengths": EDGES}, {"lengths": [9000], "sinks": "mixed", "query": "pair", "descale": "float"},
                    {"lengths": [(i * 37) % 400 for i in range(160)], "query": "views", "sinks": "finite"},
                    {"lengths": [3, 2000, 0, 70], "inputs": "large", "row_pad": 16, "q_pad": 16}):
        case = posed(spec, seed=len(options), **options)
        result = run(case)
        check(case, *result)
        assert same(result, run(case)), "not the same bits"


@pytest.mark.parametrize("spec", [s for s in E4M3 if s["rows"] == 16 and not s["causal"]], ids=str)
def test_captured_graph_stays_right(spec):
    """One capture, then lengths that split otherwise."""
    case = posed(spec, [4096, 64, 700, 2500], seed=3)
    out, lse = run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jitmla.mla_decode(*case.args, **case.kwargs, out=out, lse=lse)
    for lengths in ([17, 0, 513, 1], [0, 0, 0, 2500], [4096, 64, 700, 2500]):
        case.args[3].copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        assert same((out, lse), run(case)), lengths


def test_scales_count_once():
    """Three scales, none of them 1, as numbers and as tensors: the logits have both descales, out has the cache's."""
    plain = mla_decode_problem([300, 65], heads=16, device="cuda", seed=5)
    results = []
    for descale in ("float", "tensor"):
        case = featured(plain, kv="e4m3", q="e4m3", descale=descale, scales=(0.37, 0.0131))
        result = run(case)
        check(case, *result)
        results.append(result)
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-4)


def test_large_bf16_queries_fit_fp16():
    """|q| beyond what fp16 holds, in one head; small ones in another."""
    case = posed(next(s for s in E4M3 if s["dtype"] == "bf16" and s["rows"] == 16 and s["kv_lora_rank"] == 512),
                 [300, 64], seed=6, sm_scale=1e-6)
    q = case.args[0]
    q[:, :, 0] *= 3e6
    q[:, :, 1] *= 1e-3
    check(dataclasses.replace(case, exact=dataclasses.replace(case.exact, q=q)), *run(case))


KINDS = [s for s in E4M3 if s["rows"] in (16, 512) and not s["causal"] and s["kv_lora_rank"] == 512
         and s["page_size"] in (0, 64) and s["dtype"] != "fp16"]


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_hundred_runs_give_the_same_bits(spec):
    case = posed(spec, [(i * 577) % 5000 for i in range(12)], seed=2)
    first = run(case)
    assert all(same(first, run(case)) for _ in range(100))


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_one_graph_for_a_thousand_batches(spec):
    """Captured once with short lengths; then random ragged lengths, each replay bit for bit as an eager call."""
    case = posed(spec, [MOST] * BATCH, seed=4, poison=False)
    replayed, lengths = over_ragged_batches(lambda: run(case), case.args[3], seed=3)
    check(dataclasses.replace(case, exact=dataclasses.replace(case.exact, lengths=lengths)), *replayed)
