"""The stages of one private step as plain functions: torch and numpy, never Lightning.

Read them in the order of the arrow: :mod:`sample` → :mod:`microbatch` → (an engine of :mod:`lightning_dp.engines`,
which uses :mod:`clip`) → :mod:`reduce` → :mod:`noise` → :mod:`average`; :mod:`step` puts the whole step on one page
and :mod:`randomness` says where each stage's random numbers come from.
"""
