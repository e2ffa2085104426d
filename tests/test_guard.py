"""What a compiled decode kernel refuses by itself: the compiler's wrapper compares a call with the fake arguments that
the template was compiled with, before it touches the GPU. So this runs without one: the tensors claim to be on cuda:0,
and a call that passes the wrapper ends at the CUDA driver."""

import ctypes
import os

import pytest

from jitmla import compile, load, registry
from jitmla.store import Store

from .keysets import spec, usual_choices
from .support.tiny import needs_compiler

pytestmark = needs_compiler
CPU, CUDA = 1, 2
DTYPES = {"bf16": (4, 16), "fp16": (2, 16), "fp32": (2, 32), "int32": (0, 32), "int64": (0, 64)}
B, S_Q, HEADS, LATENT, WIDTH, PAGE = 3, 1, 8, 512, 576, 64


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
                ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]  # the last two: DLManagedTensor


class Claim:
    """A tensor that is only its description."""

    def __init__(self, dtype, shape, strides=None, address=1 << 20, device=(CUDA, 0)):
        if strides is None:
            strides = [1]
            for n in reversed(shape[1:]):
                strides.insert(0, strides[0] * n)
        self.device, sizes = device, ctypes.c_int64 * len(shape)
        self.arrays = sizes(*shape), sizes(*strides)
        self.tensor = _DLTensor(address, *device, len(shape), *DTYPES[dtype], 1, *self.arrays, 0, None, None)

    def __dlpack__(self, **_options):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)

    def __dlpack_device__(self):
        return self.device


ARGUMENTS = {
    "q": Claim("bf16", (B, S_Q, HEADS, WIDTH)),
    "q_pe": Claim("bf16", (B, S_Q, HEADS, WIDTH)),
    "kv_cache": Claim("bf16", (9, PAGE, WIDTH)),
    "block_table": Claim("int32", (B, 5)),
    "seq_lens": Claim("int32", (B,)),
    "sinks": Claim("fp32", (HEADS,)),
    "out": Claim("bf16", (B, S_Q, HEADS, LATENT)),
    "lse": Claim("fp32", (1, 1, 1)),
    "workspace": Claim("fp32", (1000,)),
    "semaphores": Claim("int32", (132,)),
    "sm_scale": 0.1, "pe_offset": LATENT, "flags": 0, "parts": 132, "fixed": 1, "least": 1, "bias": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The fastest one to compile; the others have the same fake arguments (below). The store is that of
    test_templates_compile.py."""
    tvm_ffi = pytest.importorskip("tvm_ffi")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    store = Store(os.environ.get("JITMLA_TEST_CACHE") or shared / "compiled")
    choice = registry.choose(spec("bf16", LATENT, PAGE, HEADS, False))
    assert choice in usual_choices("mla_decode"), "a Key that nothing else compiles"
    function = load.load(compile.get_or_compile(choice.key, choice.source, store), "mla_decode")

    def call(**over):
        assert over.keys() <= ARGUMENTS.keys()
        values = {**ARGUMENTS, **over}.values()
        function(*(tvm_ffi.from_dlpack(v) if isinstance(v, Claim) else v for v in values))

    return call


def passes(kernel, **over):
    """The wrapper lets the call through: what fails is the launch."""
    with pytest.raises(RuntimeError, match=r"(?i)cuda"):
        kernel(**over)


def test_the_layout_that_is_meant(kernel):
    passes(kernel)


@pytest.mark.parametrize("over", [
    {"q": Claim("bf16", (B, S_Q, HEADS, LATENT)), "q_pe": Claim("bf16", (B, S_Q, HEADS, 64)), "pe_offset": 0},
    {"q": Claim("bf16", (B, S_Q, HEADS, WIDTH), (HEADS * 640, 3, 640, 1))},  # s_q = 1: its stride says nothing
    {"kv_cache": Claim("bf16", (9, PAGE, WIDTH), (PAGE * 1000 + 8, 1000, 1))},
    {"block_table": Claim("int32", (B, 0), (0, 1))},
    {"block_table": Claim("int32", (B, 5), (7, 1))},
    {"lse": Claim("fp32", (B, S_Q, HEADS), (1, 1, B)), "flags": 3},
])
def test_other_layouts_that_the_kernel_serves(kernel, over):
    passes(kernel, **over)


@pytest.mark.parametrize(("error", "over"), [
    (r"argument #0 .*", {"q": Claim("fp16", (B, S_Q, HEADS, WIDTH))}),
    (r"argument #0 .*", {"q": Claim("bf16", (B, HEADS, WIDTH))}),
    (r"q\.strides\[2\]", {"q": Claim("bf16", (B, S_Q, HEADS, WIDTH), (HEADS * 580, HEADS * 580, 580, 1))}),
    (r"q_pe\.shape\[0\]", {"q": Claim("bf16", (1, S_Q, HEADS, WIDTH))}),
    (r"q_pe\.shape\[1\]", {"q": Claim("bf16", (B, 2, HEADS, WIDTH))}),
    (r"q_pe\.shape\[2\]", {"q_pe": Claim("bf16", (B, S_Q, 4, WIDTH))}),
    (r"kv_cache\.shape\[1\]", {"kv_cache": Claim("bf16", (9, 32, WIDTH))}),
    (r"kv_cache\.shape\[2\]", {"kv_cache": Claim("bf16", (9, PAGE, LATENT))}),
    (r"kv_cache\.strides\[1\]", {"kv_cache": Claim("bf16", (9, PAGE, WIDTH), (PAGE * 580, 580, 1))}),
    (r"kv_cache\.strides\[2\]", {"kv_cache": Claim("bf16", (9, PAGE, WIDTH), (PAGE * 1152, 1152, 2))}),
    (r"Misaligned .* argument #2", {"kv_cache": Claim("bf16", (9, PAGE, WIDTH), address=(1 << 20) + 8)}),
    (r"device index on argument #2", {"kv_cache": Claim("bf16", (9, PAGE, WIDTH), device=(CUDA, 1))}),
    (r"argument #2 .*device_type=cuda", {"kv_cache": Claim("bf16", (9, PAGE, WIDTH), device=(CPU, 0))}),
    (r"argument #3 .*dtype=int32", {"block_table": Claim("int64", (B, 5))}),
    (r"block_table\.shape\[0\]", {"block_table": Claim("int32", (B + 1, 5))}),
    (r"block_table\.strides\[1\]", {"block_table": Claim("int32", (B, 5), (1, B))}),
    (r"seq_lens\.shape\[0\]", {"seq_lens": Claim("int32", (B - 1,))}),
    (r"argument #5 .*dtype=float32", {"sinks": Claim("bf16", (HEADS,))}),
    (r"out\.shape\[2\]", {"out": Claim("bf16", (B, S_Q, 4, LATENT))}),
    (r"sinks\.strides\[0\]", {"sinks": Claim("fp32", (HEADS,), (2,))}),
    (r"out\.strides\[3\]", {"out": Claim("bf16", (B, S_Q, HEADS, LATENT), (HEADS * 1024, HEADS * 1024, 1024, 2))}),
    (r"out\.shape\[3\]", {"out": Claim("bf16", (B, S_Q, HEADS, WIDTH))}),
    (r"Misaligned .* argument #6", {"out": Claim("bf16", (B, S_Q, HEADS, LATENT), address=(1 << 20) + 2)}),
    (r"argument #7 .*ndim=3", {"lse": Claim("fp32", (B, HEADS))}),
    (r"Misaligned .* argument #8", {"workspace": Claim("fp32", (1000,), address=(1 << 20) + 64)}),
    (r"argument #9 .*dtype=int32", {"semaphores": Claim("fp32", (132,))}),
])
def test_what_is_refused(kernel, error, over):
    with pytest.raises(ValueError, match=error):
        kernel(**over)


@pytest.mark.parametrize("over", [{"block_table": None}, {"block_table": 5}, {"flags": 1.5}, {"sm_scale": None}])
def test_arguments_of_another_type(kernel, over):
    with pytest.raises(TypeError, match="argument #"):
        kernel(**over)
