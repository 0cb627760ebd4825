"""Kernels for what no library call does well on CUDA, in Triton, which is optional: torch brings it where it has CUDA.

They are one more form of a layer (:mod:`lightning_dp.engines.forms`), offered on CUDA where Triton can be imported, and taken
only where they were measured to be faster. Nothing imports Triton before one of them is computed.
"""
