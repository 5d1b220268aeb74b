"""Training loops and what they write."""

from m3po.runners.m3po_runner import M3PORunner

__all__ = ["M3PORunner"]
