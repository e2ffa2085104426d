"""The portable kernel on a GPU: every Key of PORTABLE_ON_GPU against the float64 oracle, poisoned as all problems are.

Kernels come from tests/keysets.py, so these tests run from a prewarmed cache on a machine without the compiler.
"""

import pytest
import torch

import jitmla
from jitmla import dispatch, why
from jitmla.errors import InvalidArgument, NoTemplate
from jitmla.spec import mla_decode_spec
from jitmla.testing import mla_decode_oracle, mla_decode_problem
from jitmla.testing_features import featured
from jitmla.testing_memory import poisoned_empty

from ..keysets import PORTABLE_ON_GPU
from ..support.replay import BATCH, MOST, over_ragged_batches

pytestmark = pytest.mark.gpu
RAGGED = [0, 1, 63, 64, 65, 511, 2500, 4096, 130, 17]
Q_LENS = [1, 0, 2, 3, 1, 2, 3, 3, 0, 1]

# (problem, features) of each Key, in the order of PORTABLE_ON_GPU
CASES = [
    (dict(heads=16, page_size=7, qk_rope_head_dim=32, sinks="mixed"), {}),
    (dict(heads=31, page_size=1, qk_rope_head_dim=16, inputs="large"), {}),
    (dict(heads=128, s_q=2, page_size=100, qk_rope_head_dim=32, sinks="finite"), {}),
    (dict(heads=3, page_size=33, kv_lora_rank=256, qk_rope_head_dim=32, dtype=torch.float16), {}),
    (dict(heads=5, s_q=3, page_size=7, kv_lora_rank=128, qk_rope_head_dim=16, dtype=torch.float16), {}),
    (dict(heads=96, page_size=7, kv_lora_rank=64, qk_rope_head_dim=0), {}),
    (dict(heads=8, s_q=8, page_size=5, kv_lora_rank=256, qk_rope_head_dim=32), {}),
    (dict(heads=16, page_size=7, qk_rope_head_dim=32, sinks="finite"), dict(kv="e4m3")),
    (dict(heads=8, s_q=4, page_size=7, kv_lora_rank=128, qk_rope_head_dim=0, dtype=torch.float16), dict(kv="e4m3")),
    (dict(heads=64, s_q=2, page_size=24, qk_rope_head_dim=32), dict(kv="e4m3", q="e4m3", descale="float")),
    (dict(heads=8, s_q=3, sinks="mixed"), dict(q_lens=Q_LENS, extra_tokens=3)),
    (dict(heads=16, sinks="finite"), dict(batch_invariant=True)),
    (dict(heads=12, page_size=3, dtype=torch.float16), dict(split=True)),
    (dict(heads=16, s_q=4, page_size=3, dtype=torch.float16), dict(split=True)),
    (dict(heads=64, s_q=5, page_size=1, dtype=torch.float16), dict(split=True)),
    (dict(heads=100, s_q=2, page_size=16, dtype=torch.float16), dict(split=True)),
    (dict(heads=64, s_q=3, page_size=16, sinks="mixed"),
     dict(kv="e4m3", q_lens=Q_LENS, extra_tokens=2, batch_invariant=True)),
    (dict(heads=16, s_q=3, sinks="mixed"), dict(kv="e4m3", q="e4m3", q_lens=Q_LENS, extra_tokens=2)),
    (dict(heads=7, kv_lora_rank=64, qk_rope_head_dim=16), dict(kv="e4m3", q="e4m3", batch_invariant=True)),
]


def case(index, lengths=RAGGED, seed=1):
    options, features = CASES[index]
    return featured(mla_decode_problem(lengths, device="cuda", seed=seed, **options), **features)


def run(made, **change):
    return jitmla.mla_decode(*made.args, **{**made.kwargs, "backend": "portable", **change}, return_lse=True)


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def test_the_cases_are_those_of_the_keys():
    specs = []
    for options, features in CASES:
        o = {"s_q": 1, "page_size": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": torch.bfloat16, **options}
        dtype = "e4m3" if features.get("q") else "fp16" if o["dtype"] == torch.float16 else "bf16"
        specs.append(mla_decode_spec(
            arch="sm_90a", dtype=dtype, kv_dtype=features.get("kv", dtype), kv_lora_rank=o["kv_lora_rank"],
            qk_rope_head_dim=o["qk_rope_head_dim"], page_size=o["page_size"], s_q=o["s_q"], heads=o["heads"],
            causal=True, split_cache="split" in features, compact="q_lens" in features,
            batch_invariant="batch_invariant" in features))
    assert specs == PORTABLE_ON_GPU


@pytest.mark.parametrize("index", range(len(CASES)))
def test_against_the_oracle(index):
    """Ragged, with lengths 0; one long request, which is split over the GPU; and more requests than it has parts."""
    one_q = CASES[index][1].get("q_lens") is None
    for lengths in [RAGGED, *([[9000], [b % 130 for b in range(300)]] if one_q else [])]:
        made = case(index, lengths)
        with poisoned_empty():
            out, lse = run(made)
            torch.cuda.synchronize()
        made.check(out, lse)
        if made.tokens is not None:
            extra = made.args[0].shape[0] - made.tokens[0].shape[0]
            assert bool(out[-extra:].isnan().all()) and bool(lse[-extra:].isnan().all()), "rows that nobody asked for"


def test_slots():
    """One page a request of any size; the slot's offset is beyond 2^31 bytes."""
    made = featured(mla_decode_problem(RAGGED, device="cuda", heads=16), slots=True)
    made.check(*run(made))
    pages, rows = 40, 65536
    cache = torch.empty(pages, rows, 576, dtype=torch.bfloat16, device="cuda")
    assert cache[:-1].numel() * 2 > 2**31
    cache[-1, :100].normal_()
    q = torch.randn(1, 1, 16, 576, dtype=torch.bfloat16, device="cuda") / 10
    table, lens = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([[pages - 1]], [100]))
    out = jitmla.mla_decode(q, cache, table, lens, kv_lora_rank=512, sm_scale=0.1)
    near = jitmla.mla_decode(q, cache[-1:, :100], torch.zeros_like(table), lens, kv_lora_rank=512, sm_scale=0.1)
    assert torch.equal(out, near)


@pytest.mark.parametrize("index", [0, 2, 7, 10, 11])
def test_hundred_runs_give_the_same_bits(index):
    made = case(index)
    rows = made.args[0].shape[0] if made.tokens is None else made.tokens[0].shape[0]
    first = [x[:rows] for x in run(made)]
    assert all(same([x[:rows] for x in run(made)], first) for _ in range(100))


def test_batch_invariant():
    """Each request alone has the bits that it has among others, whatever their number and lengths."""
    options = dict(heads=16, device="cuda", sinks="finite")
    lengths = [9000, 1, 2048, 0, 2049, 64, 5000, 4096]
    made = featured(mla_decode_problem(lengths, **options), batch_invariant=True)
    whole = run(made)
    q, cache, table, lens = made.args
    for chosen in ([0], [2], [4], [5, 0], [6, 1, 7], list(range(7, -1, -1)), [0] * 200):
        part = jitmla.mla_decode(q[chosen], cache, table[chosen], lens[chosen], **made.kwargs, return_lse=True)
        assert same(part, [x[chosen] for x in whole]), chosen


@pytest.mark.parametrize("heads, page_size, backend", [
    (16, 64, "sm90"), (128, 64, "sm90"), (16, 1, "sm90"), (64, 1, "sm90"), (16, 7, "portable"), (100, 7, "portable")])
def test_one_graph_for_a_thousand_batches(heads, page_size, backend):
    """Captured once with short lengths; then random ragged lengths, each replay bit for bit as an eager call."""
    s_q = 2 if backend == "portable" and heads > 16 else 1
    problem = mla_decode_problem([MOST] * BATCH, heads=heads, s_q=s_q, page_size=page_size, device="cuda", poison=False,
                                 qk_rope_head_dim=32 if backend == "portable" else 64)
    replayed, lengths = over_ragged_batches(
        lambda: jitmla.mla_decode(*problem.args, **problem.kwargs, backend=backend, return_lse=True), problem.seq_lens,
        seed=3)
    mla_decode_oracle(type(problem)(**{**vars(problem), "lengths": lengths})).check(*replayed)


def test_who_is_taken():
    """auto prefers the native kernel where there is one; a named backend is strict; explain says it."""
    problem = mla_decode_problem([70], heads=16, device="cuda")
    spec = mla_decode_spec(arch=dispatch.arch_of(problem.device), dtype="bf16", kv_lora_rank=512, qk_rope_head_dim=64,
                           page_size=64, s_q=1, heads=16, causal=True)
    assert why.explain(spec)["template"] != "portable" and why.explain(spec, "portable")["template"] == "portable"
    odd = mla_decode_problem([70], heads=16, page_size=7, qk_rope_head_dim=32, device="cuda")
    mla_decode_oracle(odd).check(jitmla.mla_decode(*odd.args, **odd.kwargs))
    with pytest.raises(NoTemplate, match="qk_rope_head_dim=32"):
        jitmla.mla_decode(*odd.args, **odd.kwargs, backend="sm90")


def test_mistakes():
    problem = mla_decode_problem([70], heads=16, page_size=7, qk_rope_head_dim=32, device="cuda")
    jitmla.mla_decode(*problem.args, **problem.kwargs)
    out = torch.zeros(problem.out_shape, dtype=problem.dtype, device="cuda")
    for change in (dict(sinks=torch.zeros(3, device="cuda")), dict(lse=torch.zeros(1, 1, 3, device="cuda")),
                   dict(kv_descale=1.0), dict(batch_invariant=1)):
        with pytest.raises((InvalidArgument, TypeError)):
            jitmla.mla_decode(*problem.args, **{**problem.kwargs, **change}, out=out)
    assert not bool(out.any()), "written although refused"
