"""The calls of FlashInfer and FlashMLA on a GPU, with the parameters of their own tests where those apply.

The parameters are restated here (their tests compare with their own reference; these with the float64 oracle):
FlashInfer 0.6.8, tests/attention/test_deepseek_mla.py and test_trtllm_gen_mla.py; FlashMLA, tests of dense decode.
docs/engines.md says what of them is out of scope.
"""

import itertools
import math

import pytest
import torch

from jitmla.compat import flash_mla, flashinfer
from jitmla.testing import mla_decode_oracle, mla_decode_problem
from jitmla.testing_features import featured

pytestmark = pytest.mark.gpu

KV_LENGTHS = list(itertools.product((0, 1, 3, 11), (17, 33, 79, 114), (514, 2743, 8736)))


def wrapper_run(problem, case, q_lens, base_e=False):
    page = problem.kv_cache.shape[1]
    counts = [-(-n // page) for n in problem.lengths]
    used = torch.arange(problem.block_table.shape[1], device="cuda") < torch.tensor(counts, device="cuda")[:, None]
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(0, device="cuda"))
    wrapper.plan(torch.tensor([0, *q_lens]).cumsum(0).int(), torch.tensor([0, *counts]).cumsum(0).int(),
                 problem.block_table[used], problem.seq_lens, problem.out_shape[2], 512, 64, page, problem.causal,
                 problem.sm_scale, problem.dtype, problem.dtype)
    q, cache = case.args[0].flatten(0, -3), case.args[1]
    return wrapper.run(q[..., :512], q[..., 512:], *cache, return_lse=True, return_lse_base_on_e=base_e)


@pytest.mark.parametrize("heads, q_len, page", [(16, 1, 1), (16, 3, 1), (16, 17, 1), (64, 5, 1), (16, 9, 16)])
def test_flashinfer_wrapper(heads, q_len, page):
    """test_batch_mla_varlen_page_attention and test_batch_mla_page_attention: fp16, separate latent and rope caches."""
    for lengths in (*KV_LENGTHS[::9], [514] * 157):
        problem = mla_decode_problem(list(lengths), heads=heads, s_q=q_len, page_size=page, dtype=torch.float16,
                                     device="cuda", seed=len(lengths))
        case = featured(problem, split=True)
        out, lse = wrapper_run(problem, case, [q_len] * len(lengths))
        shape = (len(lengths), q_len)
        mla_decode_oracle(problem).check(out.unflatten(0, shape), lse.unflatten(0, shape) * math.log(2))


@pytest.mark.parametrize("batch", [1, 4, 256])
@pytest.mark.parametrize("q_len", [1, 2])
def test_flashinfer_trtllm(batch, q_len):
    """test_trtllm_batch_decode_mla: 128 heads, pages of 64, lengths below 1024, bf16; e4m3 with a page that is not."""
    lengths = [1 + (b * 379) % 1024 for b in range(batch)]
    for page, features in ((64, {}), (24, dict(kv="e4m3", q="e4m3", descale="float"))):
        if features and q_len == 1:
            continue
        problem = mla_decode_problem(lengths, heads=128, s_q=q_len, page_size=page, device="cuda", seed=batch)
        case = featured(problem, **features)
        q_scale, kv_scale = (case.kwargs.get(n, 1.0) for n in ("q_descale", "kv_descale"))
        out = flashinfer.trtllm_batch_decode_with_kv_cache_mla(
            case.args[0], case.args[1].unsqueeze(1), torch.empty(0, device="cuda"), 128, 512, 64, *case.args[2:], 1024,
            bmm1_scale=problem.sm_scale * q_scale * kv_scale, bmm2_scale=kv_scale)
        mla_decode_oracle(case.exact).check(out)


@pytest.mark.parametrize("heads, s_q, causal", [(64, 1, False), (128, 1, False), (128, 2, True), (126, 2, True),
                                                (9, 1, True), (63, 1, False), (3, 1, True)])
def test_flashmla_dense(heads, s_q, causal):
    """Pages of 64, ragged lengths with zeros, garbage in the table's tail, NaN behind each length; +inf for no keys."""
    lengths = [0, 1, 5, 64, 4096, 511, 0, 1000, 2049]
    problem = mla_decode_problem(lengths, heads=heads, s_q=s_q, device="cuda", causal=causal)
    metadata, _ = flash_mla.get_mla_metadata()
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache(problem.q, problem.kv_cache.unsqueeze(2), problem.block_table,
                                                    problem.seq_lens, 512, metadata, None, problem.sm_scale, causal)
    lse = lse.transpose(1, 2)
    oracle = mla_decode_oracle(problem)
    assert bool(((lse == math.inf) == oracle.lse.isneginf()).all())
    oracle.check(out, torch.where(lse == math.inf, -math.inf, lse))
