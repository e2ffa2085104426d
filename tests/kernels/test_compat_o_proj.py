"""vLLM's quantiser and DeepGEMM's product in jitmla.compat on a GPU, with the parameters of their own tests."""

from __future__ import annotations

import pytest

from ..support.marks import ON_HOPPER
from ..test_compat_o_proj import check_both, check_einsum, check_quantiser

pytestmark = ON_HOPPER


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("heads, groups", [(64, 8), (32, 4), (128, 8), (4, 2)])
@pytest.mark.parametrize("tokens", [1, 7, 32, 128, 4096])
def test_quantiser(tokens, heads, groups, seed, packed):
    check_quantiser(tokens, heads, groups, seed, packed, "cuda")


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("tokens", [4, 32, 128, 4096, 8192])
def test_einsum(tokens, ue8m0):
    check_einsum(tokens, 8, 4096, 1024, ue8m0, "cuda")


@pytest.mark.parametrize("heads, groups", [(64, 8), (128, 8)])
@pytest.mark.parametrize("tokens", [1, 7, 32, 128])
def test_both(tokens, heads, groups):
    check_both(tokens, heads, groups, "cuda")
