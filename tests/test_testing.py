"""The oracle, the criterion and the poison: they must find what they are there to find."""

import dataclasses

import pytest
import torch

from jitmla.testing import GARBAGE_PAGES, ORACLE_TOKENS, _groups, mla_decode_oracle, mla_decode_problem
from jitmla.testing_memory import guarded, poisoned_empty


def exact(problem):
    """(out, lse) as a perfect kernel would round them, and the oracle."""
    oracle = mla_decode_oracle(problem)
    return oracle.out.to(problem.dtype), oracle.lse.float(), oracle


# ------------------------------------------------------------------------------------------------- problems


def test_the_same_arguments_give_the_same_problem():
    make = dict(lengths=[40, 0, 7], heads=3, s_q=2, page_size=16, sinks="mixed", query="pair", row_pad=8)
    a, b, c = mla_decode_problem(**make), mla_decode_problem(**make), mla_decode_problem(**make, seed=1)
    assert torch.equal(a.kv_cache.view(torch.int16), b.kv_cache.view(torch.int16))
    assert torch.equal(a.block_table, b.block_table) and torch.equal(a.q[0], b.q[0])
    assert not torch.equal(a.q[0], c.q[0])


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_all_that_must_not_be_read_is_poisoned(page_size):
    lengths = [40, 0, 7, 64]
    problem = mla_decode_problem(lengths, heads=2, page_size=page_size, row_pad=8, page_pad=16, q_pad=8, first_page=2,
                                 spare_pages=3, extra_table=2)
    live = 0
    for b, n in enumerate(lengths):
        pages = -(-n // page_size)
        ids = problem.block_table[b].tolist()
        assert all(2 <= i < problem.kv_cache.shape[0] for i in ids[:pages])
        assert len(ids) > pages and all(i in GARBAGE_PAGES for i in ids[pages:])
        rows = problem.kv_cache[problem.block_table[b, :pages].long()].flatten(0, 1)
        assert bool(rows[:n].isfinite().all()) and bool(rows[n:].isnan().all())
        live += n
    # beside those rows everything is NaN, whichever way the buffer is strided
    storage = problem.kv_cache.as_strided((problem.kv_cache.shape[0] * problem.kv_cache.stride(0),), (1,))
    assert int(storage.isfinite().sum()) == live * 576
    q = problem.q.as_strided((problem.q.stride(0) * len(lengths),), (1,))
    assert int(q.isnan().sum()) == len(lengths) * 2 * 8 and bool(problem.q.isfinite().all())
    used = torch.cat([problem.block_table[b, :-(-n // page_size)] for b, n in enumerate(lengths)])
    assert len(set(used.tolist())) == len(used), "each page belongs to one request"


def test_inputs_are_those_of_the_criterion():
    usual = mla_decode_problem([2000], heads=64, poison=False, spare_pages=0)
    large = mla_decode_problem([2000], heads=64, poison=False, spare_pages=0, inputs="large")
    rows = [p.kv_cache[p.block_table[0, :31].long()].float() for p in (usual, large)]
    assert abs(float(rows[0].std()) - 0.1) < 0.001 and float(rows[0].abs().max()) <= 1
    assert abs(float(rows[1].std()) - 1) < 0.01
    spread = [mla_decode_oracle(p).lse.float() for p in (usual, large)]
    assert float(spread[0].std()) < 0.1 and float(spread[1].mean()) > 30


# ------------------------------------------------------------------------------------------------- the oracle


def test_the_oracle_by_hand():
    """Two keys, one head: the formula written out with Python floats."""
    import math
    problem = mla_decode_problem([2], heads=1, kv_lora_rank=64, qk_rope_head_dim=0, sm_scale=0.7, page_size=1,
                                 dtype=torch.float16)
    q = problem.q[0, 0, 0].double().tolist()
    keys = [problem.kv_cache[problem.block_table[0, j], 0].double().tolist() for j in range(2)]
    x = [0.7 * sum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
    total = math.exp(x[0]) + math.exp(x[1])
    oracle = mla_decode_oracle(problem)
    assert float(oracle.lse) == pytest.approx(math.log(total), rel=1e-12)
    expected = [(math.exp(x[0]) * a + math.exp(x[1]) * b) / total for a, b in zip(*keys, strict=True)]
    assert oracle.out.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    sinks = torch.tensor([0.3])
    with_sink = mla_decode_oracle(dataclasses.replace(problem, sinks=sinks))
    factor = total / (total + math.exp(float(sinks)))
    assert with_sink.out.flatten().tolist() == pytest.approx([factor * e for e in expected], rel=1e-9)
    assert torch.equal(with_sink.lse, oracle.lse)


def test_requests_are_independent_of_their_company():
    problem = mla_decode_problem([70, 0, 3, 200], heads=3, s_q=2, page_size=16)
    whole = mla_decode_oracle(problem)
    for b in (0, 1, 3):
        one = mla_decode_oracle(problem, [b])
        assert torch.allclose(one.out[0], whole.out[b], rtol=1e-12, atol=1e-15)
        assert torch.allclose(one.lse[0], whole.lse[b], rtol=1e-12)
    some = mla_decode_oracle(problem, [3, 0])
    assert torch.allclose(some.out, whole.out[[3, 0]], rtol=1e-12, atol=1e-15)


def test_groups_hold_every_request_once_and_few_tokens():
    lengths = [0, 5, 40000, 3, 0, 70000, 30000, 30000, 6]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups = list(_groups(order, lengths))
    assert sorted(i for g in groups for i in g) == [i for i, n in enumerate(lengths) if n]
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= ORACLE_TOKENS for g in groups)


@pytest.mark.parametrize("s_q", [1, 3])
def test_no_key_is_seen(s_q):
    problem = mla_decode_problem([0, 1], heads=2, s_q=s_q, sinks="finite")
    oracle = mla_decode_oracle(problem)
    assert not oracle.out[0].any() and bool((oracle.lse[0] == float("-inf")).all())
    assert not oracle.out[1, :s_q - 1].any() and bool((oracle.lse[1, :s_q - 1] == float("-inf")).all())
    assert bool(oracle.lse[1, s_q - 1].isfinite().all()) and bool(oracle.out[1, s_q - 1].any())


# ------------------------------------------------------------------------------------------------- the criterion


@pytest.mark.parametrize("inputs", ["usual", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_perfect_result_passes(inputs, dtype):
    problem = mla_decode_problem([0, 1, 2, 100, 700], heads=5, s_q=2, inputs=inputs, dtype=dtype, sinks="mixed")
    out, lse, oracle = exact(problem)
    report = oracle.check(out, lse)
    assert report.out.ratio < 0.5 and report.lse.ratio < 0.1 and report.faults == []


WRONG = {
    "one element": lambda o, s: o[3, 1, 2, 17].add_(0.05),
    "one element is NaN": lambda o, s: o[3, 1, 2, 17].fill_(float("nan")),
    "one element is inf": lambda o, s: o[3, 1, 2, 17].fill_(float("inf")),
    "an unwritten head": lambda o, s: o[3, 1, 2].zero_(),
    "two heads exchanged": lambda o, s: o[3, 1, 1:3].copy_(o[3, 1, 1:3].flip(0)),
    "something where no key is seen": lambda o, s: o[0, 0, 0, 0].fill_(1e-2),
    "lse of one head": lambda o, s: s[3, 1, 2].add_(0.01),
    "lse in base 2": lambda o, s: s.mul_(1.4427),
    "+inf for an empty row": lambda o, s: s[0].fill_(float("inf")),
    "a finite lse for an empty row": lambda o, s: s[0].fill_(-1e30),
    "lse is NaN": lambda o, s: s[3, 1, 2].fill_(float("nan")),
    "-inf for a row that sees keys": lambda o, s: s[3, 1, 2].fill_(float("-inf")),
}


@pytest.mark.parametrize("inputs", ["usual", "large"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_fail(name, inputs):
    problem = mla_decode_problem([0, 1, 2, 20, 700], heads=5, s_q=2, inputs=inputs)
    out, lse, oracle = exact(problem)
    WRONG[name](out, lse)
    faults = oracle.compare(out, lse).faults
    assert faults
    with pytest.raises(AssertionError) as caught:
        oracle.check(out, lse)
    assert "page 64, torch.bfloat16, causal=True" in str(caught.value)
    if name == "an unwritten head":
        assert "of heads [2]" in faults[0] and faults[0].startswith("out: 0.0 instead of ")


def test_small_errors_everywhere_fail_by_their_cosine():
    """Each element may pass on its own while all of them together are too far off: the values are tiny in long
    requests, and the absolute bound is far above them."""
    problem = mla_decode_problem([3000], heads=4)
    out, lse, oracle = exact(problem)
    noisy = (out.float() * 1.0 + torch.randn(out.shape) * 1e-5).to(out.dtype)
    faults = oracle.compare(noisy, lse).faults
    assert len(faults) == 1 and faults[0].startswith("cosine difference")


def test_the_mask_one_key_off_fails():
    """A causal limit that is one key too late, in the middle of nowhere, among 500 keys."""
    problem = mla_decode_problem([500], heads=2, s_q=3)
    off = dataclasses.replace(problem, causal=False)
    faults = mla_decode_oracle(problem).compare(*exact(off)[:2]).faults
    assert any(f.startswith("lse") for f in faults)


def test_shapes_must_match():
    problem = mla_decode_problem([5], heads=4, s_q=2)
    out, lse, oracle = exact(problem)
    with pytest.raises(AssertionError, match="lse has shape"):
        oracle.check(out, lse.transpose(1, 2))
    with pytest.raises(AssertionError, match="out has shape"):
        oracle.check(out[:, 0], lse)


# ------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape, strides", [((3, 4), None), ((3, 4), (10, 2)), ((2, 3, 4), (1, 2, 20)), ((0, 4), None),
                                            ((5,), (3,))])
def test_guards(dtype, shape, strides):
    guard = guarded(shape, dtype, "cpu", strides)
    assert guard.tensor.shape == shape and bool(guard.tensor.isnan().all()) and guard.intact()
    if strides:
        assert guard.tensor.stride() == strides
    guard.tensor.copy_(torch.randn(shape))
    assert guard.intact(), "writing inside is what it is for"
    guard.fill()
    assert bool(guard.tensor.isnan().all())


@pytest.mark.parametrize("offset", [-256, -1, 4, 15, 28, 256])
def test_a_write_outside_is_noticed(offset):
    """Before, in the gaps of, and behind a strided tensor; one element of fp32."""
    guard = guarded((4, 4), torch.float32, "cpu", (8, 1))
    flat = guard.tensor.as_strided((1,), (1,), guard.tensor.storage_offset() + offset)
    flat.fill_(0.0)
    assert not guard.intact()


def test_torch_empty_is_poisoned_on_gpus_only(monkeypatch):
    real = torch.empty
    with poisoned_empty() as made:
        assert torch.empty is not real
        assert torch.empty(3).shape == (3,) and torch.empty((2, 3), dtype=torch.int32).shape == (2, 3) and made == []
    assert torch.empty is real
    with pytest.raises(ValueError, match="inner"), poisoned_empty():
        raise ValueError("inner")
    assert torch.empty is real


@pytest.mark.gpu
def test_poisoned_allocations():
    with poisoned_empty() as made:
        x = torch.empty((3, 5), dtype=torch.float32, device="cuda")
        y = torch.empty(7, dtype=torch.bfloat16, device=torch.device("cuda"))
        z = torch.empty(7, dtype=torch.int32, device="cuda")
    assert [g.tensor.shape for g in made] == [x.shape, y.shape] and z.shape == (7,)
    assert bool(x.isnan().all()) and bool(y.isnan().all()) and x.data_ptr() % 128 == 0 == y.data_ptr() % 128
    with pytest.raises(AssertionError, match=r"\[\[4\]\]"), poisoned_empty():
        w = torch.empty(4, dtype=torch.float32, device="cuda")
        w.as_strided((1,), (1,), w.storage_offset() + 4).fill_(1.0)
