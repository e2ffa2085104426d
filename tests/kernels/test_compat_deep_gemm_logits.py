"""DeepGEMM's indexer logits in jitmla.compat on a GPU, in the sizes of its own tests (those with up to 32768 keys)."""

from __future__ import annotations

import pytest

from ..support.marks import ON_HOPPER
from ..test_compat_deep_gemm_logits import check_paged, check_ragged

pytestmark = ON_HOPPER


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("rows, keys", [(2048, 4096), (2048, 8192), (4096, 8192)])
def test_ragged(rows, keys, parallel, compressed):
    check_ragged(rows, keys, parallel, compressed, "cuda")


@pytest.mark.parametrize("requests, next_n, average", [(64, 1, 8192), (64, 2, 8192), (128, 1, 8192), (32, 4, 8192),
                                                       (16, 1, 32768)])
def test_paged(requests, next_n, average):
    check_paged(requests, next_n, average, next_n == 2, "cuda")
