"""Typed front of the C++ extension: one module per op, docstrings with shapes, units, errors and source."""

from mlx_server.ops._load import check_extension

check_extension()
