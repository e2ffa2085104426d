"""torch.ops.jitmla.* around DSA's indexer: what they say they write, fakes with the real strides, torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import jitmla
from jitmla import torch_ops_indexer
from jitmla.testing_indexer import DIM, FP8, PAGE, append_problem, index_pool, prologue_problem
from jitmla.testing_logits import logits_problem

OPS = torch.ops.jitmla
# torch.compile and opcheck warn about their own internals
pytestmark = pytest.mark.filterwarnings("default")
# No backward, so no autograd registration to check. test_schema compares with arithmetic that PyTorch lacks for e4m3;
# test_only_what_is_declared_is_written stands in for it.
TESTS = ("test_faketensor", "test_aot_dispatch_dynamic")
I32 = torch.int32


def prologue(tokens=5):
    return *prologue_problem(tokens).args, False, "pow2_f32", False, 1e-6, "auto"


def cat_quant(tokens=5):
    v = torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    return v[:, :64], v[:, 64:], "pow2_f32", "auto"


def keys(tokens):
    rng = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, DIM, generator=rng).to(FP8), torch.rand(tokens, 1, generator=rng)


def scatter(tokens=5):
    return *keys(tokens), index_pool(2), torch.arange(tokens) * 3, "auto"


def pack(tokens=5):
    rows = torch.randn(tokens, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    return rows[:, :512], rows[:, 512:], torch.zeros(3, 8, 1, 656, dtype=torch.uint8), torch.arange(tokens) * 2, "auto"


def filled_pool():
    pool = index_pool(3)
    jitmla.indexer_k_scatter(*keys(3 * PAGE), pool, torch.arange(3 * PAGE))
    return pool


TABLE = torch.tensor([[2, 0], [1, 1]], dtype=I32)


def gather(tokens=5):
    return filled_pool(), TABLE, torch.tensor([0, tokens - tokens // 2, tokens], dtype=I32), tokens, "auto"


def mqa(tokens=5):
    p, zero = logits_problem(tokens, 70, heads=32), torch.zeros(tokens, dtype=I32)
    return p.q, p.k, p.k_scale, p.weights, zero, zero + 70, True, 0, "auto"


def paged(tokens=2):
    p = logits_problem(2, 1)
    return p.q.view(2, 1, 64, DIM), filled_pool(), p.weights, torch.tensor([128, 128], dtype=I32), TABLE, 128, "auto"


def topk(tokens=5):
    values = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(0))
    return values, 8, None, None, torch.full((tokens,), 33, dtype=I32), 1, "auto"


def to_global(tokens=5):
    chosen = torch.arange(tokens * 4, dtype=I32).view(tokens, 4)
    return chosen, torch.arange(tokens, dtype=I32) % 2, TABLE, 64, None, 0, None, None, "auto"


CALLS = {"indexer_prologue": prologue, "cat_quant_fp8": cat_quant, "indexer_k_gather": gather, "fp8_mqa_logits": mqa,
         "fp8_paged_mqa_logits": paged, "topk_indices": topk, "local_to_global": to_global}
def append(tokens=5):
    p = append_problem(tokens, 3, "fp8")
    return *p.args, *p.index.values(), "auto"


# what each writes: the arguments by number and name
WRITERS = {"indexer_k_scatter": (scatter, {2: "cache"}), "kv_row_pack": (pack, {2: "cache"}),
           "dsa_append": (append, {1: "q_out", 6: "kv_cache", 10: "index_cache"})}
OUT = {"indexer_k_gather": ["k_fp8", "k_scale"], "fp8_mqa_logits": ["out"], "fp8_paged_mqa_logits": ["out"],
       "topk_indices": ["out"], "local_to_global": ["out", "valid_count"]}


def bits(x):
    return x.contiguous().view(torch.uint8) if x.dtype == FP8 else x


def fresh(name):
    """Tensors to write to, as the functional op would return them."""
    real = getattr(OPS, name)(*CALLS[name]())
    real = list(real) if isinstance(real, tuple) else [real]
    made = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(0) if x.dtype != FP8 else
            torch.zeros(x.shape, dtype=torch.uint8).view(FP8) for x in real]
    return made + ([torch.zeros(len(made[0]), dtype=I32)] if name == "local_to_global" else [])


def test_schemas_declare_what_is_written():
    def writes(op):
        return [a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    declared = {name: writes(getattr(OPS, name)) for name in torch_ops_indexer.DEFINED}
    assert declared == {**{n: [] for n in CALLS}, **{n: [*w.values()] for n, (_, w) in WRITERS.items()},
                        **{f"{n}_out": w for n, w in OUT.items()}}
    for name in torch_ops_indexer.DEFINED:
        returns = getattr(OPS, name).default._schema.returns
        assert bool(returns) == (name in CALLS) and all(r.alias_info is None for r in returns)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name), CALLS[name](), test_utils=TESTS)
    if name in OUT:
        torch.library.opcheck(getattr(OPS, f"{name}_out"), (*CALLS[name](), *fresh(name)), test_utils=TESTS)


@pytest.mark.parametrize("name", WRITERS)
def test_opcheck_of_writers(name):
    torch.library.opcheck(getattr(OPS, name), WRITERS[name][0](), test_utils=TESTS)


@pytest.mark.parametrize("name", OUT)
def test_both_forms_do_the_same(name):
    results, given = getattr(OPS, name)(*CALLS[name]()), fresh(name)
    assert getattr(OPS, f"{name}_out")(*CALLS[name](), *given) is None
    for a, b in zip(results if isinstance(results, tuple) else (results,), given, strict=False):
        assert bits(a).any() and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("name", [n for n in CALLS if n != "fp8_paged_mqa_logits"])
def test_fakes_have_the_strides_of_the_real_ones(name, tokens):
    arguments = CALLS[name](tokens)
    real = getattr(OPS, name)(*arguments)
    with FakeTensorMode() as mode:
        fake = getattr(OPS, name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    for a, b in zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]:
        assert (a.shape, a.dtype, a.device, a.stride(), a.storage_offset()) == (
            b.shape, b.dtype, b.device, b.stride(), b.storage_offset())


@pytest.mark.parametrize("name", [*CALLS, *WRITERS])
def test_only_what_is_declared_is_written(name):
    arguments = CALLS[name]() if name in CALLS else WRITERS[name][0]()
    before = [bits(x).clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    getattr(OPS, name)(*arguments)
    written = {} if name in CALLS else WRITERS[name][1]
    for i, (x, y) in enumerate(zip(arguments, before, strict=True)):
        if isinstance(x, torch.Tensor):
            assert torch.equal(bits(x), y) == (i not in written)


def layer(problem_args, pool, slots, table, lens):
    """What an engine compiles: the prologue, the cache, logits, top-k, rows."""
    q, k, k_scale, weights = jitmla.indexer_prologue(*problem_args)
    jitmla.indexer_k_scatter(k, k_scale, pool, slots)
    logits = jitmla.fp8_paged_mqa_logits(q[:, None], pool, weights, lens, table, max_context_len=128)
    chosen = jitmla.topk_indices(logits, 16, seq_lens=lens)
    rows = jitmla.local_to_global(chosen, torch.arange(len(lens), dtype=I32), table)
    return rows, logits[:, :30] + 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_bitwise_eager(backend):
    torch.compiler.reset()
    pools = [filled_pool() for _ in range(2)]
    rest = torch.tensor([3, 69]), TABLE, torch.tensor([30, 100], dtype=I32)
    problem = prologue_problem(2).args
    got = torch.compile(layer, fullgraph=True, backend=backend)(problem, pools[0], *rest)
    expected = layer(problem, pools[1], *rest)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]) and torch.equal(*pools)


def test_one_graph_for_all_numbers_of_tokens():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: jitmla.indexer_prologue(*args), fullgraph=True, dynamic=True,
                             backend=counter)
    compiled(*prologue_problem(5).args)
    compiles = counter.frame_count
    for tokens in (5, 7, 33):
        arguments = prologue_problem(tokens).args
        for a, b in zip(compiled(*arguments), jitmla.indexer_prologue(*arguments), strict=True):
            assert torch.equal(bits(a), bits(b))
    assert counter.frame_count == compiles
