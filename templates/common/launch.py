"""What a launch can ask for that the DSL has no parameter for."""

from contextlib import contextmanager

from cutlass import Int32
from cutlass._mlir.dialects import cuda


@contextmanager
def smem_carveout(percent):
    """Launches traced inside ask for this percentage of the L1 as shared memory; with None, for nothing.

    The DSL's preferred_smem_carveout is set by its own loader, which an exported kernel does not meet. The attribute
    of a launch is what reaches the binary; the DSL has the operation, and here it is put behind one that every launch
    emits.
    """
    if percent is None:
        yield
        return
    emit = cuda.launch_cfg_cooperative

    def with_carveout(config, cooperative, loc=None, ip=None):
        cuda.launch_cfg_shared_mem_carveout(config, Int32(percent).ir_value(loc=loc, ip=ip), loc=loc, ip=ip)
        return emit(config, cooperative, loc=loc, ip=ip)

    cuda.launch_cfg_cooperative = with_carveout
    try:
        yield
    finally:
        cuda.launch_cfg_cooperative = emit
