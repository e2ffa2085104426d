"""cached_mla on CPU tensors (the reference) against the float64 oracle, its argument checks, and the schedule of it."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jitmla
import jitmla.ops.cached_mla as op
from jitmla import pick, schedule
from jitmla.compat import trtllm
from jitmla.errors import InvalidArgument, InvalidArgumentType, JitmlaError
from jitmla.spec import cached_mla_specs
from jitmla.testing_cached import cached_oracle, cached_problem, check_cached

DETERMINED = settings(deadline=None, derandomize=True, database=None, max_examples=60)
E4M3 = torch.float8_e4m3fn
TINY = {"nope": 32, "rope": 16, "rank": 64, "value": 32}


def run(problem, **options):
    with torch.inference_mode():
        return jitmla.cached_mla(*problem.args, **problem.kwargs, **options)


@st.composite
def problems(draw, **fixed):
    cached, new = st.integers(0, 20), st.integers(0, 9)
    rows = draw(st.booleans())
    return dict(prefill=draw(st.lists(st.tuples(cached, new), max_size=4)), decode=draw(st.lists(cached, max_size=4)),
                heads=draw(st.sampled_from([1, 3, 4, 6, 12])), gap=0 if rows else draw(st.sampled_from([0, 0, 2])),
                tail=draw(st.sampled_from([0, 0, 3])), rows=rows, strided=draw(st.booleans()), max_seq_len=32,
                dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])), e4m3=draw(st.booleans()),
                seed=draw(st.integers(0, 99)), **{**TINY, **fixed})


@given(problems())
@DETERMINED
def test_against_the_oracle(arguments):
    problem = cached_problem(**arguments)
    check_cached(problem, run(problem))


def test_the_oracle_sees_mistakes():
    """A lost head, a token too many in the mask, a token that was not appended, a token written twice."""
    problem = cached_problem([(5, 6), (0, 4)], [9], heads=6, **TINY)
    out = run(problem)
    check_cached(problem, out)
    for spoil in (lambda x: x[:, :, 5].zero_(), lambda x: x[0, 3, 2].mul_(1.05)):
        wrong = out.clone()
        spoil(wrong)
        with pytest.raises(AssertionError, match="off by more"):
            check_cached(problem, wrong)
    for place in ((problem.sequences[0][2], 4), (problem.sequences[1][2], 4)):
        problem.kv_cache[place] = 1.0
        with pytest.raises(AssertionError, match=r"cache differs in"):
            check_cached(problem, out)


@pytest.mark.parametrize("how", ["prefill", "rows", "decode"])
def test_out_is_written_and_returned(how):
    counts = {"prefill": dict(prefill=[(3, 4), (0, 2)], tail=2), "rows": dict(prefill=[(3, 4), (0, 2)], rows=True),
              "decode": dict(decode=[3, 0, 9])}[how]
    problem = cached_problem(heads=3, **counts, **TINY)
    out = torch.full((*problem.q_nope.shape[:3], 32), float("nan"), dtype=torch.bfloat16)
    assert run(problem, out=out) is out
    check_cached(problem, out)
    again = problem.again()
    assert torch.equal(run(again), out)


def test_a_sequence_without_a_slot_is_skipped():
    problem = cached_problem([(3, 4), (0, 2)], [7], heads=3, **TINY)
    problem.metadata["slot_idx"][1] = -1
    out = run(problem)
    assert not out[0, 4:6].any() and out[0, 6].any()
    slot = problem.sequences[1][2]
    assert torch.equal(problem.kv_cache[slot].isnan(), problem.before[slot].isnan())


def test_beyond_the_slot_nothing_is_written():
    problem = cached_problem(decode=[31, 3], heads=3, max_seq_len=32, **TINY)
    problem.metadata["input_pos"][0] = 32
    out = run(problem)
    slot = problem.sequences[0][2]
    assert torch.equal(problem.kv_cache[slot].isnan(), problem.before[slot].isnan())
    assert out.isfinite().all()


def test_the_weight_is_read_by_each_call():
    """Nothing is kept of it: not after a change in place, and not after another tensor took its memory."""
    problem = cached_problem(decode=[3, 0, 9], heads=3, **TINY)
    with torch.inference_mode():
        run(problem)
        problem.weight.mul_(-0.5)
        check_cached(problem, run(problem))
    twin = problem.again()
    object.__setattr__(twin, "weight", problem.weight.clone() * 2)
    check_cached(twin, run(twin))


# ------------------------------------------------------------------------------------------------- argument checks

CHANGES = [
    (dict(q_nope=torch.zeros(1, 9, 3, 32)), InvalidArgumentType, "q_nope"),
    (dict(q_pe=torch.zeros(1, 9, 2, 16, dtype=torch.bfloat16)), InvalidArgument, r"\[1, 9, 2, 16\]"),
    (dict(latent=torch.zeros(1, 8, 64, dtype=torch.bfloat16)), InvalidArgument, "latent"),
    (dict(k_pe=torch.zeros(1, 9, 3, 16, dtype=torch.bfloat16)), InvalidArgument, "k_pe"),
    (dict(weight=torch.zeros(191, 64, dtype=torch.bfloat16)), InvalidArgument, "191 rows of 64"),
    (dict(weight=torch.zeros(96, 64, dtype=torch.bfloat16)), InvalidArgument, "96 rows of 64"),
    (dict(weight=torch.zeros(192, 32, dtype=torch.bfloat16)), InvalidArgument, "192 rows of 32"),
    (dict(weight=torch.zeros(192, 64, dtype=torch.float16)), InvalidArgumentType, "kv_b_proj_weight"),
    (dict(kv_cache=torch.zeros(4, 32, 64, dtype=torch.bfloat16)), InvalidArgument, "80"),
    (dict(kv_cache=torch.zeros(4, 32, 80, dtype=torch.float16)), InvalidArgumentType, "kv_cache"),
    (dict(kv_cache=torch.zeros(4, 32, 80, dtype=torch.uint8).view(E4M3)), InvalidArgument, "float8_e4m3fn without"),
    (dict(kv_scale=torch.ones(1)), InvalidArgument, "bfloat16 with kv_scale"),
    (dict(kv_cache=torch.zeros(4, 32, 80, dtype=torch.uint8).view(E4M3), kv_scale=torch.ones(2)), InvalidArgument,
     "kv_scale"),
    (dict(kv_cache=torch.zeros(4, 32, 80, dtype=torch.uint8).view(E4M3), kv_scale=0.5), InvalidArgumentType, "kv_sca"),
    (dict(max_prefix=-1), InvalidArgumentType, "max_prefix=-1"),
    (dict(max_prefix=True), InvalidArgumentType, "max_prefix=True"),
    (dict(form="mqa"), InvalidArgument, "auto, absorbed, mha"),
    (dict(seq_len=torch.zeros(3, dtype=torch.int64)), InvalidArgumentType, "seq_len"),
    (dict(slot_idx=torch.zeros(2, dtype=torch.int32)), InvalidArgument, "each of the 3 sequences"),
    (dict(cu_seqlen=torch.zeros(4, dtype=torch.int32, device="meta")), InvalidArgument, "cu_seqlen on meta"),
    (dict(num_decode=1.0), InvalidArgumentType, "num_decode=1.0"),
    (dict(num_prefill=-1), InvalidArgumentType, "negative"),
    (dict(prefill_tokens=10), InvalidArgument, "they are 11 tokens"),
    (dict(sm_scale=float("nan")), InvalidArgument, "sm_scale"),
    (dict(sm_scale=0.0), InvalidArgument, "sm_scale"),
    (dict(out=torch.zeros(1, 9, 3, 16, dtype=torch.bfloat16)), InvalidArgument, "out"),
    (dict(backend="nothing"), InvalidArgument, "no such backend"),
    (dict(backend="sm90"), InvalidArgument, "cpu"),
]


@pytest.mark.parametrize("change, error, words", CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_what_is_refused(change, error, words):
    problem = cached_problem([(3, 4), (0, 4)], [7], heads=3, max_seq_len=32, **TINY)
    names = ("q_nope", "q_pe", "latent", "k_pe", "weight", "kv_cache")
    arguments = dict(zip(names, problem.args, strict=True)) | problem.kwargs | change
    before = problem.kv_cache.clone().view(torch.int16)
    with pytest.raises(error, match=words):
        jitmla.cached_mla(*[arguments.pop(n) for n in names], **arguments)
    assert torch.equal(problem.kv_cache.view(torch.int16), before)


# ------------------------------------------------------------------------------------------------- AutoDeploy's name


def batch_info(problem, extend=0):
    """The counts as AutoDeploy has them; the last `extend` of the prefill sequences are extend sequences."""
    c = problem.counts
    moved = sum(new for _, new, _, _ in problem.sequences[c["num_prefill"] - extend:c["num_prefill"]])
    return torch.tensor([c["num_prefill"] - extend, c["prefill_tokens"] - moved, extend, moved, c["num_decode"],
                         c["num_decode"], 0, 0, 0, 0, 0, 0], dtype=torch.int32)


def autodeploy(problem, extend=0):
    m = problem.metadata
    return (*problem.args[:5], batch_info(problem, extend), m["seq_len"], m["input_pos"], m["slot_idx"],
            m["cu_seqlen"], problem.kv_cache, problem.sm_scale, problem.latent.shape[2])


@pytest.mark.parametrize("extend", [0, 1])
def test_trtllm(extend):
    problem = cached_problem([(5, 6), (0, 4)], [9], heads=6, **TINY)
    with torch.inference_mode():
        check_cached(problem, trtllm.triton_cached_mla_with_cache(*autodeploy(problem, extend)))
    decode = cached_problem(decode=[9, 3], heads=6, **TINY)
    with torch.inference_mode():
        check_cached(decode, trtllm.triton_cached_mla_with_cache(*autodeploy(decode)))


def test_trtllm_defaults_and_out():
    problem = cached_problem(decode=[9, 3], heads=2, nope=32, rope=64, rank=512, value=32)
    args = autodeploy(problem)
    out = torch.full((2, 1, 2, 32), float("nan"), dtype=torch.bfloat16)
    assert trtllm.triton_cached_mla_with_cache(*args[:11], out=out).numel() == 0
    exact = cached_oracle(problem.__class__(**{**problem.__dict__, "sm_scale": 96**-0.5}))
    torch.testing.assert_close(out.flatten(0, 1).double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("counts", [None, torch.zeros(12), torch.zeros(5, dtype=torch.int32),
                                    torch.zeros(12, dtype=torch.int32, device="meta")])
def test_trtllm_counts_are_on_the_host(counts):
    problem = cached_problem(decode=[9, 3], heads=2, **TINY)
    args = list(autodeploy(problem))
    args[5] = counts
    with pytest.raises(InvalidArgumentType, match="batch_info_host"):
        trtllm.triton_cached_mla_with_cache(*args)
    with pytest.raises(InvalidArgument, match="kv_lora_rank=512"):
        trtllm.triton_cached_mla_with_cache(*autodeploy(problem)[:-1])


# ------------------------------------------------------------------------------------------------- schedule


def test_context_tiles():
    assert [schedule.context_tile(32, 1, t) for t in (1, 2, 3, 15, 17, 4096)] == [2, 2, 4, 16, 16, 16]
    assert [schedule.context_tile(h, 1, 4096) for h in (1, 3, 96, 128)] == [512, 128, 4, 4]
    assert schedule.context_tile(8, 100, 250) == 4
    for heads in range(1, 129):
        assert 2 * heads <= schedule.context_tile(heads, 3, 10**6) * heads <= 512


def test_the_form_by_sizes():
    def form(sequences, tokens, prefix, heads=32, rank=256):
        return pick.cached_form(heads=heads, kv_lora_rank=rank, sequences=sequences, tokens=tokens, prefix=prefix)

    assert form(1, 20, True)[0] == "absorbed" and form(1, 5000, True)[0] == "mha"
    assert form(100, 3000, True)[0] == "absorbed", "many short sequences"
    for heads, rank in ((8, 512), (32, 256), (128, 512)):
        least = min(n for n in range(1, 5000) if form(1, n, True, heads, rank)[0] == "mha")
        assert form(1, least - 1, False, heads, rank)[0] == "mha", "without prefixes it is worth it earlier"
    assert "9600 query rows, 100 new tokens a sequence" in form(3, 300, True)[1]


def test_explain_says_the_form():
    spec, _ = cached_mla_specs(arch="sm_90a", dtype="bf16", qk_nope_head_dim=64, kv_lora_rank=256, qk_rope_head_dim=64)
    assert jitmla.explain(spec)["form"] == "by heads, kv_lora_rank, sequences, tokens, prefix of the call"
    found = jitmla.explain(spec, heads=32, kv_lora_rank=256, sequences=1, tokens=5000, prefix=True)
    assert found["form"].startswith("mha: 160000 query rows") and found["template"] == "absorb"
    with pytest.raises(InvalidArgument, match="heads, kv_lora_rank, prefix, sequences"):
        jitmla.explain(spec, tokens=5000)


@given(st.integers(0, 2**32))
@settings(DETERMINED, max_examples=300)
def test_every_token_has_a_tile(seed):
    """The closed form of templates/common/cached_rows.py: tiles of different sequences differ, and there are enough."""
    rng = random.Random(seed)
    tile = rng.choice([2, 4, 8, 64])
    lengths = [rng.choice([0, 1, tile - 1, tile, tile + 1, rng.randint(0, 200)]) for _ in range(rng.randint(1, 9))]
    starts, at = [], rng.choice([0, 0, 3])
    for n in lengths:
        starts.append(at)
        at += n + rng.choice([0, 0, 1, tile])
    taken = [start // tile + i + k for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
             for k in range(-(-n // tile))]
    assert len(set(taken)) == len(taken) and taken == sorted(taken)
    assert all(t < schedule.context_tiles(at, len(lengths), tile) for t in taken)


@pytest.mark.parametrize("length, slot, stride, page", [
    (2048, 2048 * 320, 320, 64), (512, 512 * 576, 576, 64), (96, 96 * 80, 80, 32), (48, 48 * 80, 80, 16),
    (100, 100 * 80, 80, 100), (1000, 80000, 80, 125), (7, 560, 80, 7), (2048, 2056 * 336, 336, 8),
    (131, 131 * 80, 80, 1), (64, 99 * 80, 80, 1)])
def test_pages_of_a_slot(length, slot, stride, page):
    assert schedule.slot_page(length, slot, stride) == page
    assert length % page == 0 and slot % (page * stride) == 0


@pytest.mark.parametrize("strided", [False, True])
def test_the_paged_view_is_the_same_memory(strided):
    wide = torch.arange(5 * 96 * 16).view(5, 96, 16).float()
    cache = wide[1:, :, :8] if strided else wide[1:].contiguous()
    pages = op._pages(cache)
    assert pages.size == 32 and op._pages(cache) is pages
    for slot in range(4):
        rows = torch.cat([pages.view[slot * pages.of_slot + j] for j in range(3)])
        assert torch.equal(rows, cache[slot])
    assert pages.view.data_ptr() == cache.data_ptr() and len(pages.view) == 3 * pages.of_slot + 3
    address, known = cache.data_ptr(), len(op._paged)
    other = cache.view(cache.shape)
    assert op._pages(other) is not pages, "another tensor may have other strides"
    del cache, other, pages
    assert address not in op._paged and len(op._paged) == known - 1, "the view kept the cache alive"


def test_errors_are_jitmla_errors():
    assert issubclass(InvalidArgument, JitmlaError) and issubclass(InvalidArgumentType, JitmlaError)
