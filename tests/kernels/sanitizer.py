"""A few small calls of each op for compute-sanitizer, by hand (it is slow: a minute or two each):

    export JITMLA_CACHE_DIR=...  PYTORCH_NO_CUDA_MEMORY_CACHING=1      (so that bounds are those of each tensor)
    compute-sanitizer --tool memcheck  python -m tests.kernels.sanitizer mla_decode o_proj
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitizer mla_decode o_proj
    compute-sanitizer --tool initcheck python -m tests.kernels.sanitizer mla_decode o_proj

Results are checked as well. The shapes of mla_decode meet all kernels, whole and split requests, the causal limit,
sinks, several row tiles, small and large pages; those of the output path every variant, ragged tiles, and the chain;
those of `indexer` each kernel around DSA's indexer, every variant of top-k on values of every kind, and both ops of a
layer; those of `cached_mla` both its forms, and append_latent; those of sparse_mla each of its kernels.
JITMLA_CACHE_DIR should hold what `python -m tests.keysets` puts there.
"""

from __future__ import annotations

import itertools
import sys

import torch

import jitmla
from jitmla import dsa, pick, registry, tune
from jitmla.ops import topk_indices as topk_op
from jitmla.spec_indexer import topk_indices_spec
from jitmla.testing import mla_decode_oracle, mla_decode_problem
from jitmla.testing_cached import cached_problem, check_cached
from jitmla.testing_dsa import dsa_batch, dsa_layer, dsa_oracle
from jitmla.testing_features import featured
from jitmla.testing_indexer import PAGE, check_prologue, index_pool, prologue_problem
from jitmla.testing_logits import check_logits, check_topk, exact_logits, exact_topk, logits_problem, topk_rows
from jitmla.testing_o_proj import (
    CHAIN_DIFF,
    calc_diff,
    check_product,
    check_quant,
    exact_chain,
    product_problem,
    quant_problem,
)
from jitmla.testing_prefill import check_prefill, prefill_problem
from jitmla.testing_sparse import sparse_mla_oracle, sparse_mla_problem
from tests.kernels import test_mla_decode_e4m3 as e4m3
from tests.keysets import (
    ARCH,
    CAUSAL,
    HEAD_DIMS,
    USUAL_QUANT,
    covering_choices,
    decode_tunings,
    quant_spec,
    sparse_spec,
)
from tests.support.paged import check_paged

CASES = [
    dict(lengths=[0, 1, 65, 300], heads=8),
    dict(lengths=[700, 64], heads=16, sinks="mixed"),
    dict(lengths=[3, 200], heads=8, s_q=2),
    dict(lengths=[0, 130, 1000], heads=63, sinks="finite"),
    dict(lengths=[700, 2], heads=32),
    dict(lengths=[2, 700], heads=128, s_q=2),
    dict(lengths=[40] * 140, heads=16),
    dict(lengths=[70] * 70 + [900], heads=128),
    dict(lengths=[100, 17, 0], heads=128, kv_lora_rank=256, page_size=32),
    dict(lengths=[100, 17, 0], heads=16, kv_lora_rank=256, page_size=32),
    dict(lengths=[300, 15], heads=40, page_size=16, s_q=2, row_pad=8, page_pad=16, q_pad=8, query="pair"),
    *(dict(lengths=[0, 1, 65, 300], heads=heads, page_size=page) for heads in (8, 16, 32, 64, 128) for page in (1, 7)),
]


# (problem, features) for the portable kernel: its Keys are those of PORTABLE_ON_GPU
PORTABLE = [
    (dict(lengths=[0, 1, 65, 300], heads=16, page_size=7, qk_rope_head_dim=32, sinks="mixed"), {}),
    (dict(lengths=[700, 2], heads=128, s_q=2, page_size=100, qk_rope_head_dim=32), {}),
    (dict(lengths=[3, 200, 0], heads=8, s_q=3), dict(q_lens=[2, 3, 0], extra_tokens=1)),
    (dict(lengths=[3000, 64], heads=16), dict(batch_invariant=True)),
    (dict(lengths=[130, 40], heads=16, page_size=7, qk_rope_head_dim=32), dict(kv="e4m3")),
    (dict(lengths=[130, 40], heads=64, s_q=8, page_size=24, qk_rope_head_dim=32), dict(kv="e4m3", q="e4m3")),
    (dict(lengths=[130, 40], heads=12, page_size=3, dtype=torch.float16), dict(split=True)),
]


def mla_decode() -> None:
    jitmla.use_tunings(decode_tunings())
    for case in CASES:
        problem = mla_decode_problem(device="cuda", **case)
        out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True, backend="sm90")
        torch.cuda.synchronize()
        print(case, mla_decode_oracle(problem).check(out, lse), flush=True)
    for case, features in PORTABLE:
        made = featured(mla_decode_problem(device="cuda", **case), **features)
        out, lse = jitmla.mla_decode(*made.args, **made.kwargs, return_lse=True, backend="portable")
        torch.cuda.synchronize()
        print(case, features, made.check(out, lse), flush=True)


def mla_decode_e4m3() -> None:
    """Every variant with latent 512, whole and split requests, pages by TMA and by a gather."""
    for choice in covering_choices("mla_decode"):
        if choice.template.name == "sm90_fp8" and choice.spec["kv_lora_rank"] == 512 and choice.spec["rows"] != 64:
            jitmla.use_tunings(tune.naming(choice.spec, choice.name))
            for lengths in ([0, 1, 65, 700], [40] * 140):
                case = e4m3.posed(choice.spec, lengths, sinks="mixed")
                e4m3.check(case, *e4m3.run(case))
            print(choice.variant.name, choice.spec, flush=True)
    jitmla.use_tunings(None)


def o_proj() -> None:
    usual = quant_spec(ARCH, **USUAL_QUANT)
    for choice in covering_choices("inv_rope_fp8_quant", "fp8_bmm"):
        jitmla.use_tunings(tune.naming(choice.spec, choice.name))
        if choice.spec == usual:
            for tokens, heads, groups in ((1, 16, 2), (13, 32, 2)):
                problem = quant_problem(tokens, heads=heads, groups=groups, padded_heads=heads + 3, device="cuda")
                options = {"n_groups": groups, "scale_mode": "pow2_f32"}
                got = jitmla.inv_rope_fp8_quant(*problem.args, **options, backend="simt")
                check_quant(problem, *got, scale_mode="pow2_f32", neox=False)
        elif choice.spec.op == "fp8_bmm":
            for tokens, groups, columns, k in ((5, 3, 256, 640), (130, 2, 256, 1024), (300, 1, 256, 128)):
                product = product_problem(tokens, groups=groups, columns=columns, k=k, device="cuda")
                check_product(product, jitmla.fp8_bmm(*product.args, backend="sm90"))
        else:
            continue
        print(choice.name, flush=True)
    jitmla.use_tunings(None)
    for tokens in (3, 129):
        problem = quant_problem(tokens, heads=16, groups=2, device="cuda")
        w = product_problem(1, groups=2, columns=256, k=4096, device="cuda")
        out = jitmla.o_a_proj(*problem.args, w.b, w.b_scale)
        assert calc_diff(out, exact_chain(problem, w.b, w.b_scale)) < CHAIN_DIFF
    print("chain", flush=True)


def mla_prefill() -> None:
    for backend, dims, causal in itertools.product(("sm90", "portable"), HEAD_DIMS, CAUSAL):
        for lengths in (([19, 1, 0, 130], [20, 0, 5, 300]), ([200], [77])):
            problem = prefill_problem(*lengths, heads=3, qk_head_dim=dims[0], v_head_dim=dims[1], causal=causal,
                                      device="cuda", pad=0)
            out, lse = jitmla.mla_prefill(*problem.args, **problem.kwargs, return_lse=True, backend=backend)
            print(backend, dims, causal, lengths, check_prefill(problem, out, lse), flush=True)
    check_paged((19, 1, 64), (100, 0, 63), heads=16, nope=128, v_dim=128, rank=512, device="cuda")
    print("paged", flush=True)


def topk() -> None:
    """Every variant on every kind of values, with rows that start anywhere and end at the end of their memory."""
    for name in pick.TOPK:
        for rows in ("windows", "lengths"):
            jitmla.use_tunings(tune.naming(topk_indices_spec(arch=ARCH, rows=rows), name))
            topk_op._calls.clear()
            for n in (600, 6143, 20001):
                start, ends = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([n, n], dtype=torch.int32)
                start = start if rows == "windows" else torch.zeros_like(start)
                for kind, values in topk_rows(2, n, device="cuda"):
                    where = (dict(row_start=start.cuda(), row_end=ends.cuda()) if rows == "windows"
                             else dict(seq_lens=ends.cuda()))
                    got = jitmla.topk_indices(values, 512, **where)
                    try:
                        check_topk(got, exact_topk(values.cpu(), start, ends, 512))
                    except AssertionError as e:
                        raise AssertionError(f"{name}, {rows}, {kind}, n={n}: {e}") from e
            print(name, rows, flush=True)
    jitmla.use_tunings(None)
    topk_op._calls.clear()


def indexer() -> None:
    problem = prologue_problem(3, w_dtype=torch.bfloat16, device="cuda")
    q, k, scale, weights = out = jitmla.indexer_prologue(*problem.args)
    check_prologue(problem, out)
    jitmla.cat_quant_fp8(problem.q[:, 0, :64], problem.q[:, 0, 64:])
    pool, table = index_pool(4, device="cuda"), torch.tensor([[2, 0, 3]], dtype=torch.int32, device="cuda")
    slots = torch.tensor([2 * PAGE, -1, 3 * PAGE + 63], device="cuda")
    jitmla.indexer_k_scatter(k, scale, pool, slots)
    jitmla.indexer_k_gather(pool, table, torch.tensor([0, 150], dtype=torch.int32, device="cuda"), 150)
    jitmla.fp8_paged_mqa_logits(q[:1, None], pool, weights[:1], torch.tensor([150], dtype=torch.int32, device="cuda"),
                                table, max_context_len=192)
    chosen = torch.randint(-1, 192, (3, 70), dtype=torch.int32, device="cuda")
    request = torch.zeros(3, dtype=torch.int32, device="cuda")
    jitmla.local_to_global(chosen, request, table, valid_count=torch.empty_like(request))
    for row, dtype in ((656, torch.uint8), (576, torch.bfloat16)):
        rows = torch.zeros(4, PAGE, 1, row, dtype=dtype, device="cuda")
        latent = torch.randn(3, 576, device="cuda").bfloat16()
        jitmla.kv_row_pack(latent[:, :512], latent[:, 512:], rows, slots)
    for heads in (64, 32):
        p = logits_problem(131, 700, heads=heads, device="cuda")
        ks = torch.arange(131, dtype=torch.int32, device="cuda")
        ke, column = ks + 500, torch.arange(700, device="cuda")
        inside = (column >= ks[:, None]) & (column < ke[:, None])
        for clean in (True, False):
            got = jitmla.fp8_mqa_logits(p.q, p.k, p.k_scale, p.weights, ks, ke,
                                        clean_logits=clean)
            check_logits(got, exact_logits(p.q, p.k, p.k_scale, p.weights), inside, True)
    print("small kernels and logits", flush=True)
    topk()
    layer = dsa_layer("layer", hidden=256, heads=16, index_topk=512, q_lora_rank=128, device="cuda")
    for context, generation, next_n in (([(5, 700)], [600, 30], 1), ([], [600, 513], 2)):
        batch = dsa_batch(layer, context, generation, next_n=next_n)
        hidden = torch.randn(batch.tokens, 256, device="cuda").bfloat16()
        output = torch.empty(batch.tokens, 16 * 128, dtype=torch.bfloat16, device="cuda")
        with dsa.forward(batch):
            made = torch.ops.jitmla.mla_dsa_proj(hidden, batch.positions, layer.key)
            torch.ops.jitmla.mla_dsa_attn_inplace(*made[:4], list(made[4:]), batch.positions, layer.key, output)
        expected = dsa_oracle(layer, batch, hidden, batch.positions, batch.topk)
        assert (output.double() - expected).norm() < 2e-2 * expected.norm()
    print("layer", flush=True)


SPARSE = [dict(batch=1, topk=100, invalid=0.5),
          dict(batch=3, topk=300, lengths=[0, 1, 257], sinks="mixed", invalid=0.2),
          dict(batch=70, topk=65, s_q=2, page_size=53, page_pad=48, q_pad=8)]


def sparse_mla() -> None:
    """Every kernel: lists with holes, lengths within a block, split and whole tokens, NaN in what must not be read."""
    for fmt, heads in (("fp8", 8), ("fp8", 12), ("fp8", 65), ("bf16", 8), ("bf16", 65), ("bf16", 33)):
        spec = sparse_spec(fmt, 64, heads)
        for choice in registry.choices(spec):
            jitmla.use_tunings(tune.naming(spec, choice.name))
            for case in SPARSE:
                p = sparse_mla_problem(rows=400, heads=heads, fmt=fmt, columns=576, device="cuda", **case)
                found = jitmla.sparse_mla_decode(*p.args, **p.kwargs, return_lse=True, backend="sm90")
                sparse_mla_oracle(p, sorted({0, 1 % case["batch"], case["batch"] - 1})).check(*found)
            print(fmt, heads, choice.name, flush=True)
    jitmla.use_tunings({})


def cached_mla() -> None:
    """Both forms and all stages: prefixes, gaps, skipped sequences, ends of slots, e4m3, half precision; append."""
    common = dict(heads=32, max_seq_len=256, device="cuda")
    for case in (dict(prefill=[(0, 40), (77, 130), (0, 0), (200, 3)], decode=[9, 255], gap=3, tail=2),
                 dict(decode=[0, 63, 64, 200, 7]), dict(prefill=[(3, 70), (0, 20)], decode=[7], e4m3=True)):
        for form in ("absorbed", "mha"):
            problem = cached_problem(**common, **case)
            out = jitmla.cached_mla(*problem.args, **problem.kwargs, form=form)
            torch.cuda.synchronize()
            print(case, form, check_cached(problem, out), flush=True)
    half = cached_problem([(0, 70), (5, 9)], [40], heads=6, nope=32, rank=64, rope=16, value=32, max_seq_len=128,
                          dtype=torch.float16, device="cuda")
    print("small widths", check_cached(half, jitmla.cached_mla(*half.args, **half.kwargs)), flush=True)
    rows, cache = torch.randn(9, 320, device="cuda").bfloat16(), torch.zeros(3, 5, 320, device="cuda").bfloat16()
    slots = torch.tensor([0, -1, 3, 4, 14, 15, 7, 8, 9], device="cuda")
    jitmla.append_latent(rows[:, :256], rows[:, 256:], cache, slots)
    kept = (slots >= 0) & (slots < 15)
    assert torch.equal(cache.view(15, 320)[slots[kept]], rows[kept])


PARTS = {"mla_decode": mla_decode, "mla_decode_e4m3": mla_decode_e4m3, "o_proj": o_proj, "mla_prefill": mla_prefill,
         "indexer": indexer, "cached_mla": cached_mla, "sparse_mla": sparse_mla}


if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
