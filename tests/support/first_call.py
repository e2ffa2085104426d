"""Load the tiny kernel, say whether the driver holds it, and make its first call inside a CUDA graph capture."""

import ctypes

import torch

from jitmla.load import LOAD_SUFFIX, load
from jitmla.store import Store

from .tiny import tiny_key

OP = "mla_decode"


def loaded(library):
    """Whether the driver has loaded every kernel of the CUlibrary into the current context."""
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_uint()
    assert driver.cuLibraryGetKernelCount(ctypes.byref(count), ctypes.c_void_p(library)) == 0 and count.value
    kernels = (ctypes.c_void_p * count.value)()
    assert driver.cuLibraryEnumerateKernels(kernels, count, ctypes.c_void_p(library)) == 0
    states = []
    for kernel in kernels:
        function, state = ctypes.c_void_p(), ctypes.c_int(-1)
        assert driver.cuKernelGetFunction(ctypes.byref(function), ctypes.c_void_p(kernel)) == 0
        assert driver.cuFuncIsLoaded(ctypes.byref(state), function) == 0
        states.append(state.value == 1)
    return all(states)


def main():
    x, y = torch.arange(1000, device="cuda", dtype=torch.float32), torch.zeros(1000, device="cuda")
    entry = Store().find(tiny_key())
    function = load(entry, OP, 0)
    print("in the driver before the call:", loaded(load(entry, OP + LOAD_SUFFIX)()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(x, y)
    y.zero_()
    graph.replay()
    print("captured, replayed, right:", torch.equal(y, 2 * x))


if __name__ == "__main__":
    main()
