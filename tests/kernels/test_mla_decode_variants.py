"""Every variant of mla_decode for 16-bit caches that a call could get, each by its name: the rule of jitmla.pick would
leave most of them out of the calls of other tests."""

from __future__ import annotations

import pytest
import torch

import jitmla
from jitmla import registry, tune
from jitmla.spec import mla_decode_spec
from jitmla.testing import mla_decode_oracle, mla_decode_problem

from ..support.replay import BATCH, MOST, over_ragged_batches
from .test_mla_decode import pytestmark, run, same  # noqa: F401

LENGTHS = [0, 5000, 1, 64, 700, 3, 2500, 65, 127, 17]
EACH = [(page_size, heads, choice.name) for page_size in (64, 1) for heads in (8, 16, 32, 64, 128)
        for choice in registry.choices(mla_decode_spec(
            arch="sm_90a", dtype="bf16", kv_lora_rank=512, qk_rope_head_dim=64, page_size=page_size, s_q=1,
            heads=heads, causal=True))]


@pytest.fixture(params=EACH, ids=lambda each: f"page{each[0]}-h{each[1]}-{each[2]}")
def each(request):
    """(page size, heads) of calls that run the variant."""
    page_size, heads, variant = request.param
    spec = mla_decode_spec(arch="sm_90a", dtype="bf16", kv_lora_rank=512, qk_rope_head_dim=64, page_size=page_size,
                           s_q=1, heads=heads, causal=True)
    jitmla.use_tunings(tune.naming(spec, variant))
    assert registry.choose(spec).name == variant
    yield page_size, heads
    jitmla.use_tunings(None)


@pytest.mark.parametrize("lengths", [LENGTHS, [6000], [(i * 37) % 500 for i in range(150)]], ids=["few", "one", "many"])
def test_a_hundred_runs_give_the_right_bits(each, lengths):
    page_size, heads = each
    problem = mla_decode_problem(lengths, heads=heads, page_size=page_size, device="cuda", seed=heads, sinks="finite")
    first = run(problem)
    mla_decode_oracle(problem).check(*first)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        again = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True)
        for a, b in zip(first, again, strict=True):
            wrong += (a.view(torch.uint8) != b.view(torch.uint8)).any()
    assert int(wrong) == 0 and same(first[0], again[0])


def test_one_graph_for_a_thousand_batches(each):
    """Captured once with short lengths; then random ragged lengths, each replay bit for bit as an eager call."""
    page_size, heads = each
    problem = mla_decode_problem([MOST] * BATCH, heads=heads, page_size=page_size, device="cuda", poison=False)
    replayed, lengths = over_ragged_batches(
        lambda: jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True), problem.seq_lens, seed=heads)
    mla_decode_oracle(type(problem)(**{**vars(problem), "lengths": lengths})).check(*replayed)
