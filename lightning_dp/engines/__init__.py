"""Micro-batch in, sum of clipped per-example gradients out. Engines differ in speed and memory, never in the result.

``loop`` is the reference, a plain backward pass for each example, and runs whatever trains without privacy. ``vmap`` takes all
examples at once by ``torch.func``. ``ghost`` does too, with rules for layers that spare gradients from being written out, and
is compared with the reference before training. :mod:`~lightning_dp.engines.rounded` makes integers of another engine's
gradients, one example at a time.

:mod:`~lightning_dp.engines.protocol` says what an engine is, and :mod:`~lightning_dp.engines.select` has the table of them and
picks one; :mod:`~lightning_dp.engines.fall_back` takes the next one where it cannot run a micro-batch, and
:mod:`~lightning_dp.engines.accumulate` adds the micro-batches of a step up.
"""
