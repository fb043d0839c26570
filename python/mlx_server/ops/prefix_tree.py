"""Which blocks of the KV cache already hold a request's first tokens: a radix tree over token ids, in C++."""

from mlx_server._ext import PrefixTree

__all__ = ["PrefixTree"]
