"""What the prefill ops refuse: bad input raises the stated type, names the argument, says what works."""

import pytest
import torch

import jitmla
from jitmla.errors import InvalidArgument, InvalidArgumentType
from jitmla.ops.prefill_arguments import check_prefill_layout
from jitmla.testing import mla_decode_problem
from jitmla.testing_prefill import offsets, prefill_problem

META = torch.device("meta")


def refused(error, word, call, *args, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert word in str(caught.value), str(caught.value)
    assert caught.value.differs and caught.value.supported


def x(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


I32 = torch.int32
PREFILL = {
    "no scale": (InvalidArgumentType, "mscale", {"sm_scale": None}),
    "scale of zero": (InvalidArgument, "sm_scale=0.0", {"sm_scale": 0.0}),
    "scale that is infinite": (InvalidArgument, "sm_scale=inf", {"sm_scale": float("inf")}),
    "q is no tensor": (InvalidArgumentType, "q: a list", {"q": [1]}),
    "q of rank 4": (InvalidArgument, "q: [1, 7, 2, 192]", {"q": x(1, 7, 2, 192)}),
    "q of another dtype": (InvalidArgumentType, "q", {"q": x(7, 2, 192, dtype=torch.float32)}),
    "too many heads": (InvalidArgument, "1 to 128 heads", {"q": x(7, 129, 192)}),
    "k of other heads": (InvalidArgument, "k", {"k": x(9, 3, 192)}),
    "k of another width": (InvalidArgument, "k", {"k": x(9, 2, 128)}),
    "k of three parts": (InvalidArgumentType, "k: a tuple", {"k": (x(9, 2, 64),) * 3}),
    "k_pe of other heads": (InvalidArgument, "k_pe", {"k": (x(9, 2, 128), x(9, 3, 64))}),
    "k_pe of another width": (InvalidArgument, "k_pe", {"k": (x(9, 2, 128), x(9, 1, 32))}),
    "k_pe of other keys": (InvalidArgument, "k_pe", {"k": (x(9, 2, 128), x(8, 1, 64))}),
    "k of another dtype": (InvalidArgumentType, "k", {"k": x(9, 2, 192, dtype=torch.float16)}),
    "v of other keys": (InvalidArgument, "v", {"v": x(8, 2, 128)}),
    "v with columns apart": (InvalidArgument, "v with strides", {"v": x(9, 128, 2).transpose(1, 2)}),
    "v elsewhere": (InvalidArgument, "v on meta", {"v": x(9, 2, 128, device=META)}),
    "offsets of 64 bits": (InvalidArgumentType, "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 2, 7])}),
    "fewer offsets": (InvalidArgument, "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 9], dtype=I32)}),
    "no offsets": (InvalidArgument, "cu_seqlens_q", {"cu_seqlens_q": torch.zeros(0, dtype=I32)}),
    "length that is a tensor": (InvalidArgumentType, "max_seqlen_q", {"max_seqlen_q": torch.tensor(5)}),
    "negative length": (InvalidArgument, "max_seqlen_k=-1", {"max_seqlen_k": -1}),
    "out of another shape": (InvalidArgument, "out", {"out": x(7, 2, 192)}),
    "out of another dtype": (InvalidArgumentType, "out", {"out": x(7, 2, 128, dtype=torch.float32)}),
    "lse turned round": (InvalidArgument, "lse", {"lse": torch.zeros(2, 7)}),
    "lse of another dtype": (InvalidArgumentType, "lse", {"lse": x(7, 2)}),
    "another backend": (InvalidArgument, "backend='simt'", {"backend": "simt"}),
    "a GPU backend": (InvalidArgument, "backend='sm90' on cpu", {"backend": "sm90"}),
    "q that requires a gradient": (InvalidArgument, "inference only", {"q": x(7, 2, 192).requires_grad_()}),
}


@pytest.mark.parametrize("case", PREFILL)
def test_mla_prefill(case):
    error, word, change = PREFILL[case]
    p = prefill_problem([2, 5], [4, 5], heads=2, keys="joined", pad=0)
    call = {**dict(zip(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"), p.args, strict=True)), **p.kwargs, **change}
    if change.get("sm_scale", 0) is None:
        del call["sm_scale"]
    refused(error, word, jitmla.mla_prefill, **call)


MERGE = {
    "out_a of rank 2": (InvalidArgument, "out_a", {"out_a": x(5, 8)}),
    "out_b in 32 bits": (InvalidArgumentType, "out_b", {"out_b": x(5, 2, 8, dtype=torch.float32)}),
    "two types of 16 bits": (InvalidArgumentType, "float32 or", {"out_b": x(5, 2, 8, dtype=torch.float16)}),
    "out_b of another shape": (InvalidArgument, "out_b", {"out_b": x(5, 3, 8)}),
    "lse_a turned round": (InvalidArgument, "lse_a", {"lse_a": torch.zeros(2, 5)}),
    "lse_b in 16 bits": (InvalidArgumentType, "lse_b", {"lse_b": x(5, 2)}),
    "out of another type": (InvalidArgumentType, "out", {"out": x(5, 2, 8, dtype=torch.float32)}),
    "another backend": (InvalidArgument, "backend='sm90'", {"backend": "sm90"}),
}


@pytest.mark.parametrize("case", MERGE)
def test_merge(case):
    error, word, change = MERGE[case]
    call = {"out_a": x(5, 2, 8), "lse_a": torch.zeros(5, 2), "out_b": x(5, 2, 8), "lse_b": torch.zeros(5, 2), **change}
    refused(error, word, jitmla.merge_attn_states, **call)


GATHER = {
    "cache of rank 4": (InvalidArgument, "kv_cache", {"kv_cache": x(1, 3, 64, 576)}),
    "table of 64 bits": (InvalidArgumentType, "block_table", {"block_table": torch.zeros(2, 3, dtype=torch.int64)}),
    "starts of other requests": (InvalidArgument, "starts", {"starts": torch.zeros(3, dtype=I32)}),
    "fewer offsets": (InvalidArgument, "cu_rows", {"cu_rows": torch.zeros(2, dtype=I32)}),
    "out of another width": (InvalidArgument, "out", {"out": x(9, 512)}),
    "out of another type": (InvalidArgumentType, "out", {"out": x(9, 576, dtype=torch.float16)}),
    "another backend": (InvalidArgument, "backend='sm90'", {"backend": "sm90"}),
}


@pytest.mark.parametrize("case", GATHER)
def test_gather(case):
    error, word, change = GATHER[case]
    p = mla_decode_problem([40, 3], heads=1)
    call = {"kv_cache": p.kv_cache, "block_table": p.block_table, "starts": torch.zeros(2, dtype=I32),
            "cu_rows": offsets([2, 2], "cpu"), "out": x(9, 576), **change}
    refused(error, word, jitmla.gather_latent, **call)


PAGED = {
    "another form": (InvalidArgument, "form='mqa'", {"form": "mqa"}),
    "no chunk": (InvalidArgument, "chunk_tokens=0", {"chunk_tokens": 0}),
    "a negative prefix": (InvalidArgument, "max_prefix=-1", {"max_prefix": -1}),
    "weights of other heads": (InvalidArgument, "kv_b_proj", {"kv_b_proj": x(3 * 256, 512)}),
    "weights turned round": (InvalidArgument, "kv_b_proj", {"kv_b_proj": x(512, 2 * 256).t()}),
    "weights of another type": (InvalidArgumentType, "kv_b_proj", {"kv_b_proj": torch.zeros(512, 512)}),
    "another width of v": (InvalidArgument, "v_head_dim=64", {"v_head_dim": 64}),
    "lengths of other requests": (InvalidArgument, "seq_lens", {"seq_lens": torch.zeros(3, dtype=I32)}),
    "out of another shape": (InvalidArgument, "out", {"out": x(7, 2, 512)}),
}


@pytest.mark.parametrize("case", PAGED)
def test_paged(case):
    error, word, change = PAGED[case]
    p = mla_decode_problem([40, 5], heads=1)
    call = {"q": x(7, 2, 192), "kv_cache": p.kv_cache, "block_table": p.block_table, "seq_lens": p.seq_lens,
            "cu_seqlens_q": offsets([2, 5], "cpu"), "kv_b_proj": x(512, 512), "max_seqlen_q": 5, "max_prefix": 38,
            "v_head_dim": 128, "sm_scale": 0.1, **change}
    refused(error, word, jitmla.mla_prefill_paged, **call)


ABSORBED = {
    "q of rank 4": (InvalidArgument, "q", {"q": x(1, 7, 2, 576)}),
    "lengths of 64 bits": (InvalidArgumentType, "seq_lens", {"seq_lens": torch.zeros(2, dtype=torch.int64)}),
    "fewer offsets": (InvalidArgument, "cu_seqlens_q", {"cu_seqlens_q": offsets([7], "cpu")}),
    "no rank": (InvalidArgument, "kv_lora_rank=0", {"kv_lora_rank": 0}),
    "out of another shape": (InvalidArgument, "out", {"out": x(7, 2, 576)}),
    "no scale": (InvalidArgumentType, "mscale", {"sm_scale": None}),
}


@pytest.mark.parametrize("case", ABSORBED)
def test_absorbed(case):
    error, word, change = ABSORBED[case]
    p = mla_decode_problem([40, 5], heads=1)
    call = {"q": x(7, 2, 576), "kv_cache": p.kv_cache, "block_table": p.block_table, "seq_lens": p.seq_lens,
            "cu_seqlens_q": offsets([2, 5], "cpu"), "max_seqlen_q": 5, "kv_lora_rank": 512, "sm_scale": 0.1, **change}
    if call["sm_scale"] is None:
        del call["sm_scale"]
    refused(error, word, jitmla.mla_prefill_absorbed, **call)


def test_layouts_that_kernels_cannot_read():
    p = prefill_problem([2, 5], heads=2, keys="joined", pad=0)
    loose = torch.zeros(7 * 2 * 193, dtype=torch.bfloat16).as_strided((7, 2, 192), (2 * 193, 193, 1))
    refused(InvalidArgument, "q at address", check_prefill_layout, loose, p.k, p.k, p.v, None)
    refused(InvalidArgument, "out at address", check_prefill_layout, p.q, p.k, p.k, p.v, x(7, 2, 130)[..., :128])
