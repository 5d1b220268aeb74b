"""The M3PO algorithm."""

from m3po.algorithms.m3po import M3PO

__all__ = ["M3PO"]
