"""Engines compute the sum of clipped per-example gradients; :mod:`select` picks one.

``ghost`` is the fast one, ``vmap`` is the reference, ``loop`` works for whatever ``vmap`` refuses. They differ in speed and memory only.
"""
