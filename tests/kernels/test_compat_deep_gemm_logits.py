"""DeepGEMM's indexer logits in jitmla.compat on a GPU, in the sizes of its own tests (those with up to 32768 keys)."""

from __future__ import annotations

import pytest
import torch

from ..test_compat_deep_gemm_logits import check_paged, check_ragged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is false"),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
                       reason="needs a GPU of compute capability 9.0: the kernels under test are for sm_90a"),
]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("rows, keys", [(2048, 4096), (2048, 8192), (4096, 8192)])
def test_ragged(rows, keys, parallel, compressed):
    check_ragged(rows, keys, parallel, compressed, "cuda")


@pytest.mark.parametrize("requests, next_n, average", [(64, 1, 8192), (64, 2, 8192), (128, 1, 8192), (32, 4, 8192),
                                                       (16, 1, 32768)])
def test_paged(requests, next_n, average):
    check_paged(requests, next_n, average, next_n == 2, "cuda")
