"""Bookkeeping of the KV cache's blocks: free list and reference counts and the list of idle ones, in C++."""

from mlx_server._ext import BlockPool

__all__ = ["BlockPool"]
