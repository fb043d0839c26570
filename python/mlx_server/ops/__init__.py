"""Typed front of the C++ extension: one module per op, docstrings with shapes, units, errors and source."""
