"""mla_decode with e4m3, compact queries, slot caches, a cache of two tensors: the reference, and torch.compile."""

import pytest
import torch

import jitmla
from jitmla.testing import mla_decode_problem
from jitmla.testing_features import featured

LENGTHS = [70, 0, 3, 128, 1]
Q_LENS = [2, 1, 0, 3, 1]
FEATURES = {
    "e4m3 cache": dict(kv="e4m3"), "e4m3": dict(kv="e4m3", q="e4m3", descale="float"), "slots": dict(slots=True),
    "compact": dict(q_lens=Q_LENS, extra_tokens=2), "split": dict(split=True), "invariant": dict(batch_invariant=True),
    "all": dict(kv="e4m3", q="e4m3", q_lens=Q_LENS, split=True, batch_invariant=True),
}


def made(name, **options):
    return featured(mla_decode_problem(LENGTHS, heads=4, s_q=3, page_size=16, sinks="mixed", **options),
                    **FEATURES[name])


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_reference(name, backend):
    case = made(name)
    out, lse = jitmla.mla_decode(*case.args, **case.kwargs, return_lse=True, backend=backend)
    rows = case.args[0].shape[:-1]
    assert out.shape == (*rows, 512) and lse.shape == rows and out.dtype == torch.bfloat16
    case.check(out, lse)
    given = torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))
    assert jitmla.mla_decode(*case.args, **case.kwargs, out=given[0], lse=given[1]) is given[0]
    case.check(*given)
    if case.tokens is not None:
        used = case.tokens[0].shape[0]
        assert bool(given[0][used:].isnan().all()), "rows behind the last token are not written"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FEATURES)
def test_torch_compile(name):
    torch.compiler.reset()
    case = made(name, poison=False)

    def layer(q, kv_cache, table, lens):
        return jitmla.mla_decode(q, kv_cache, table, lens, **case.kwargs, return_lse=True)

    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*case.args)
    case.check(*got)


def test_an_empty_batch():
    problem = mla_decode_problem([], heads=4)
    q = problem.q.new_zeros(0, 4, 576)
    cu = torch.zeros(1, dtype=torch.int32)
    assert jitmla.mla_decode(q, *problem.args[1:], **problem.kwargs, cu_seqlens_q=cu, max_q_len=1).shape == (0, 4, 512)


def test_the_rope_part_must_fit():
    case = made("split")
    latent, rope = case.args[1]
    for part, word in ((rope[..., :32], "qk_rope_head_dim"), (rope.half(), "float16"), (rope[:-1], "kv_cache[1]")):
        with pytest.raises((ValueError, TypeError)) as caught:
            jitmla.mla_decode(case.args[0], (latent, part), *case.args[2:], **case.kwargs)
        assert word in str(caught.value)


def test_a_large_page_is_for_slots_only():
    problem = mla_decode_problem([300], heads=4, page_size=128)
    cache = problem.kv_cache.flatten(0, 1)[None]
    wide = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="one page a request"):
        jitmla.mla_decode(problem.q, cache, wide, problem.seq_lens, **problem.kwargs)
