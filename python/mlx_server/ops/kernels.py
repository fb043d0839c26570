"""Which of the portable kernels for GPUs (csrc/kernels/README.md) the ops of this process use."""

from mlx_server import _ext


def disable_kernel(name: str) -> None:
    """Let ops take their next best way instead of the kernel of that name: another kernel, or the fallback graph.

    Args:
        name: that of the kernel's file without its ending.
    """
    _ext.disable_kernel(name)


def set_batch_invariant(wanted: bool) -> None:
    """Whether a row's result must be the same to the last bit in any batch, and however its prompt is cut.

    On GPUs ops then compute many rows as they compute one, by portable kernels alone, and raise ValueError where none
    fits. On the CPU only `gated_delta` needs another way.
    """
    _ext.set_batch_invariant(wanted)


def is_batch_invariant() -> bool:
    return _ext.is_batch_invariant()


def take_launched_kernels() -> list[str]:
    """Names, in their order, of the kernels that ops have launched since the last call. On the CPU there are none."""
    return _ext.take_launched_kernels()
