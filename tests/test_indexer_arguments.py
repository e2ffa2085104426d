"""What the ops around DSA's indexer refuse: bad input raises the stated type, names the argument, says what works."""

import pytest
import torch

import jitmla
from jitmla import dispatch
from jitmla.errors import InvalidArgument, InvalidArgumentType, NoTemplate
from jitmla.models import keys_for, specs_for
from jitmla.ops.checks import usual_strides
from jitmla.registry import choose
from jitmla.spec import Spec
from jitmla.spec_indexer import fp8_mqa_logits_spec
from jitmla.testing_indexer import FP8, append_problem, index_pool, prologue_problem
from jitmla.testing_logits import logits_problem

BF16, FP32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64


def z(*shape, dtype=FP32):
    return torch.zeros(shape, dtype=torch.uint8).view(FP8) if dtype == FP8 else torch.zeros(shape, dtype=dtype)


def prologue(**change):
    p = prologue_problem(3)
    options = {n: change.pop(n) for n in ("scale_mode", "eps", "backend") if n in change}
    return jitmla.indexer_prologue(**{**vars(p), **change}, **options)


def cat_quant(**change):
    return jitmla.cat_quant_fp8(**{"pe": z(3, 64, dtype=BF16), "nope": z(3, 64, dtype=BF16), **change})


def scatter(**change):
    return jitmla.indexer_k_scatter(**{"k_fp8": z(3, 128, dtype=FP8), "k_scale": z(3, 1), "cache": index_pool(2),
                                       "slot_mapping": z(3, dtype=I64), **change})


def gather(**change):
    return jitmla.indexer_k_gather(**{"cache": index_pool(2), "block_table": z(2, 1, dtype=I32),
                                      "cu_seq_lens": z(3, dtype=I32), "tokens": 4, **change})


def pack(**change):
    return jitmla.kv_row_pack(**{
        "kv_c": z(3, 512, dtype=BF16), "k_pe": z(3, 64, dtype=BF16), "cache": z(2, 8, 1, 656).byte(),
        "slot_mapping": z(3, dtype=I64), **change})


def append(**change):
    p = append_problem(3, 2, "fp8")
    given = {f: getattr(p, f) for f in ("q_pe", "q_out", "kv_c", "k_pe", "positions", "cos_sin_cache", "kv_cache")}
    return jitmla.dsa_append(**{**given, "slot_mapping": p.slots, **p.index, **change})


def ragged(**change):
    p = logits_problem(3, 9)
    return jitmla.fp8_mqa_logits(**{"q": p.q, "k": p.k, "k_scale": p.k_scale, "weights": p.weights,
                                    "ks": z(3, dtype=I32), "ke": z(3, dtype=I32), **change})


def paged(**change):
    p = logits_problem(2, 1)
    return jitmla.fp8_paged_mqa_logits(**{
        "q": p.q[:, None], "cache": index_pool(2), "weights": p.weights, "context_lens": z(2, dtype=I32),
        "block_table": z(2, 2, dtype=I32), "max_context_len": 64, **change})


def topk(**change):
    return jitmla.topk_indices(**{"logits": z(4, 9), "k": 2, "seq_lens": z(4, dtype=I32), **change})


def to_global(**change):
    return jitmla.local_to_global(**{"topk": z(3, 4, dtype=I32), "req_id": z(3, dtype=I32),
                                     "block_table": z(1, 2, dtype=I32), **change})


VALUE, TYPE = InvalidArgument, InvalidArgumentType
CASES = [
    (prologue, TYPE, "q", {"q": [1.0]}), (prologue, VALUE, "q", {"q": z(3, 128, dtype=BF16)}),
    (prologue, TYPE, "q of bfloat16", {"q": z(3, 64, 128, dtype=torch.float16)}),
    (prologue, VALUE, "heads of q=48", {"q": z(3, 48, 128, dtype=BF16)}),
    (prologue, VALUE, "[tokens, heads, 128]", {"q": z(3, 64, 64, dtype=BF16)}),
    (prologue, VALUE, "k_raw", {"k_raw": z(4, 128, dtype=BF16)}),
    (prologue, VALUE, "w_raw", {"w_raw": z(3, 32)}), (prologue, TYPE, "ln_bias", {"ln_bias": None}),
    (prologue, TYPE, "ln_bias", {"ln_bias": z(128, dtype=BF16)}), (prologue, TYPE, "positions", {"positions": z(3)}),
    (prologue, VALUE, "positions", {"positions": z(3, 1, dtype=I64)}),
    (prologue, VALUE, "cos_sin_cache", {"cos_sin_cache": z(9, 32)}),
    (prologue, VALUE, "scale_mode='ue8m0_i32'", {"scale_mode": "ue8m0_i32"}), (prologue, TYPE, "eps", {"eps": "x"}),
    (prologue, VALUE, "backend='sm90'", {"backend": "sm90"}),
    (prologue, VALUE, "strides", {"q": z(3, 64, 256, dtype=BF16)[..., ::2]}),
    (prologue, VALUE, "require a gradient: w_raw", {"w_raw": z(3, 64).requires_grad_()}),
    (cat_quant, VALUE, "pe with 62 columns", {"pe": z(3, 62, dtype=BF16), "nope": z(3, 66, dtype=BF16)}),
    (cat_quant, VALUE, "nope", {"nope": z(3, 60, dtype=BF16)}), (cat_quant, TYPE, "pe", {"pe": z(3, 64)}),
    (cat_quant, VALUE, "strides", {"pe": z(3, 65, dtype=BF16)[:, :64]}),
    (scatter, TYPE, "k_fp8", {"k_fp8": z(3, 128)}), (scatter, VALUE, "k_fp8", {"k_fp8": z(3, 64, dtype=FP8)}),
    (scatter, VALUE, "k_scale", {"k_scale": z(2, 1)}), (scatter, VALUE, "cache", {"cache": z(2, 32, 1, 132).byte()}),
    (scatter, VALUE, "cache", {"cache": z(2, 64, 1, 128).byte()}),
    (scatter, TYPE, "cache", {"cache": z(2, 64, 1, 132)}),
    (scatter, VALUE, "multiple of 16", {"cache": index_pool(2, 8)}),
    (scatter, TYPE, "slot_mapping", {"slot_mapping": z(3, dtype=I32)}),
    (scatter, VALUE, "at most 3 slots", {"slot_mapping": z(4, dtype=I64)}),
    (gather, VALUE, "cu_seq_lens", {"cu_seq_lens": z(2, dtype=I32)}), (gather, TYPE, "tokens", {"tokens": 4.0}),
    (gather, TYPE, "block_table", {"block_table": z(2, 1, dtype=I64)}),
    (gather, VALUE, "k_fp8", {"k_fp8": z(4, 64, dtype=FP8)}), (gather, VALUE, "k_scale", {"k_scale": z(5)}),
    (pack, VALUE, "kv_c", {"kv_c": z(3, 576, dtype=BF16)}), (pack, VALUE, "k_pe", {"k_pe": z(2, 64, dtype=BF16)}),
    (pack, VALUE, "cache", {"cache": z(2, 8, 1, 584).byte()}), (pack, TYPE, "cache", {"cache": z(2, 8, 1, 656)}),
    (pack, VALUE, "cache", {"cache": z(2, 8, 1, 656, dtype=BF16)}),
    (pack, VALUE, "at most 3 slots", {"slot_mapping": z(4, dtype=I64)}),
    (append, VALUE, "q_pe", {"q_pe": z(3, 2, 128, dtype=BF16)}), (append, TYPE, "q_pe", {"q_pe": z(3, 2, 64)}),
    (append, VALUE, "q_out", {"q_out": z(3, 3, 64, dtype=BF16)}),
    (append, VALUE, "k_pe", {"kv_c": z(4, 512, dtype=BF16)}),
    (append, VALUE, "strides", {"q_pe": z(3, 2, 66, dtype=BF16)[..., :64]}),
    (append, VALUE, "positions", {"positions": z(2, dtype=I64)}), (append, TYPE, "positions", {"positions": z(3)}),
    (append, VALUE, "all four", {"k_scale": None}), (append, VALUE, "k_fp8", {"k_fp8": z(3, 64, dtype=FP8)}),
    (append, VALUE, "slots, one for each token", {"index_slot_mapping": z(2, dtype=I64)}),
    (append, VALUE, "slot_mapping", {"slot_mapping": z(2, dtype=I64)}),
    (append, VALUE, "cache", {"kv_cache": z(2, 8, 1, 584).byte()}),
    (append, VALUE, "cos_sin_cache", {"cos_sin_cache": z(9, 32)}),
    (ragged, TYPE, "q", {"q": z(3, 64, 128)}), (ragged, VALUE, "heads of q=16", {"q": z(3, 16, 128, dtype=FP8)}),
    (ragged, VALUE, "q", {"q": z(3, 64, 64, dtype=FP8)}), (ragged, VALUE, "k_scale", {"k_scale": z(8)}),
    (ragged, VALUE, "weights", {"weights": z(3, 32)}), (ragged, TYPE, "ks", {"ks": z(3, dtype=I64)}),
    (ragged, VALUE, "ke", {"ke": z(2, dtype=I32)}), (ragged, VALUE, "clean_logits=True", {"max_seqlen_k": 9}),
    (ragged, VALUE, "out", {"out": z(3, 10)}), (ragged, VALUE, "k with strides", {"k": z(9, 256, dtype=FP8)[:, :128]}),
    (paged, VALUE, "next_n of q=3", {"q": z(2, 3, 64, 128, dtype=FP8), "weights": z(6, 64)}),
    (paged, VALUE, "context_lens", {"context_lens": z(3, dtype=I32)}), (paged, VALUE, "weights", {"weights": z(1, 64)}),
    (paged, VALUE, "block_table", {"block_table": z(1, 2, dtype=I32)}),
    (paged, VALUE, "cache", {"cache": z(2, 64, 1, 128).byte()}), (paged, VALUE, "out", {"out": z(2, 63)}),
    (topk, TYPE, "logits", {"logits": z(4, 9, dtype=BF16)}), (topk, VALUE, "k=0", {"k": 0}),
    (topk, TYPE, "k: float", {"k": 2.0}), (topk, VALUE, "row_start", {"row_start": z(4, dtype=I32)}),
    (topk, VALUE, "row_end", {"seq_lens": None}), (topk, VALUE, "next_n=3", {"next_n": 3}),
    (topk, VALUE, "seq_lens", {"next_n": 2}), (topk, TYPE, "seq_lens", {"seq_lens": z(4, dtype=I64)}),
    (topk, VALUE, "out", {"out": z(4, 3, dtype=I32)}), (topk, VALUE, "strides", {"logits": z(9, 4).T}),
    (to_global, VALUE, "page_size=48", {"page_size": 48}), (to_global, VALUE, "one of them", {"block_table": None}),
    (to_global, VALUE, "fit in 31 bits", {"num_pages": 2**26}), (to_global, TYPE, "topk", {"topk": z(3, 4, dtype=I64)}),
    (to_global, VALUE, "req_id", {"req_id": z(2, dtype=I32)}), (to_global, TYPE, "layer_offset", {"layer_offset": 0.5}),
    (to_global, VALUE, "valid_count", {"valid_count": z(2, dtype=I32)}),
]


@pytest.mark.parametrize("call, error, word, change", CASES,
                         ids=[f"{c[0].__name__}: {', '.join(c[3])} {i}" for i, c in enumerate(CASES)])
def test_refused(call, error, word, change):
    call()
    with pytest.raises(error) as caught:
        call(**change)
    assert word in str(caught.value), str(caught.value)
    assert caught.value.differs and caught.value.supported


def test_parameters_are_weights_where_autograd_does_not_record():
    weight = torch.nn.Parameter(prologue_problem(3).ln_weight)
    with torch.no_grad():
        prologue(ln_weight=weight)
    with pytest.raises(InvalidArgument, match="require a gradient: ln_weight"):
        prologue(ln_weight=weight)


def test_what_no_template_serves():
    with pytest.raises(NoTemplate, match="arch=sm_100a"):
        choose(fp8_mqa_logits_spec(arch="sm_100a", heads=64, store="clean"))


@pytest.fixture(autouse=True)
def nothing_remembered():
    yield
    dispatch.forget()


def test_a_server_meets_no_other_keys():
    """What deepseek-v3.2 calls, in each form that the ops have for it."""
    specs = set(specs_for("deepseek-v3.2", tp=8, arch="sm_90a"))
    ops = {s.op for s in specs}
    assert {"indexer_prologue", "indexer_k_scatter", "indexer_k_gather", "kv_row_pack", "fp8_mqa_logits",
            "fp8_paged_mqa_logits", "topk_indices", "local_to_global"} <= ops
    assert fp8_mqa_logits_spec(arch="sm_90a", heads=64, store="clean") in specs
    assert Spec.of("topk_indices", arch="sm_90a", dtype="fp32", rows="lengths") in specs
    keys = keys_for("deepseek-v3.2", tp=8)
    assert len({k.name for k in keys if k.spec.op == "topk_indices"}) == 4, "each variant that a call can pick"
    assert not {s.op for s in specs_for("deepseek-v3", tp=8, arch="sm_90a")} & {"topk_indices", "fp8_mqa_logits"}


def test_strides_of_dimensions_of_size_one():
    x = torch.zeros(4, 6)[:1]
    assert usual_strides(x) is x
    odd = x.as_strided((1, 6), (7, 1))
    assert usual_strides(odd).stride() == (6, 1) and usual_strides(odd).data_ptr() == odd.data_ptr()
