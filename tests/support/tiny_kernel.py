"""The smallest kernel: y = FACTOR * x. Compiles in a tenth of a second."""
# --- constants: replaced when rendered ---
FACTOR = 2.0
# --- end of constants ---
import cutlass.cute as cute  # noqa: E402
from cutlass import Float32  # noqa: E402


@cute.kernel
def scale(x: cute.Tensor, y: cute.Tensor):
    i = cute.arch.block_idx()[0] * 128 + cute.arch.thread_idx()[0]
    if i < x.shape[0]:
        y[i] = x[i] * Float32(FACTOR)


@cute.jit
def run(x: cute.Tensor, y: cute.Tensor, stream):
    scale(x, y).launch(grid=[cute.ceil_div(x.shape[0], 128), 1, 1], block=[128, 1, 1], stream=stream)


def entry():
    """What to compile: the host function and its fake arguments."""
    n = cute.sym_int()
    x, y = (cute.runtime.make_fake_compact_tensor(Float32, (n,)) for _ in range(2))
    return run, (x, y, cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True))
