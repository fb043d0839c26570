"""Which of the portable kernels for GPUs (csrc/kernels/README.md) the ops of this process use."""

from mlx_server import _ext


def disable_kernel(name: str) -> None:
    """Let ops take their next best way instead of the kernel of that name: another kernel, or the fallback graph.

    Args:
        name: that of the kernel's file without its ending.
    """
    _ext.disable_kernel(name)


def take_launched_kernels() -> list[str]:
    """Names, in their order, of the kernels that ops have launched since the last call. On the CPU there are none."""
    return _ext.take_launched_kernels()
