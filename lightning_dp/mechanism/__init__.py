"""What a step does to examples and gradients, as torch: never Lightning.

    sampling → an engine, with clip → noise → reduce → division → average

:mod:`~lightning_dp.mechanism.sampling` draws the step's examples, and an engine of :mod:`lightning_dp.engines` sums their
clipped gradients (:mod:`~lightning_dp.mechanism.clip`). :mod:`~lightning_dp.mechanism.release` is the rest on one page: the
noise comes before the reduce, for each rank adds the noise of its own share of the coordinates
(:mod:`~lightning_dp.mechanism.noise`, or on a grid of integers :mod:`~lightning_dp.mechanism.grid`) to its own sum, and then
the ranks' sums are added up (:mod:`~lightning_dp.mechanism.reduce`). So the total holds the noise once, and no rank waits for
the noise of another. The only division, by the expected batch size, comes last. :mod:`~lightning_dp.mechanism.average` is the
moving average of the weights, and :mod:`~lightning_dp.mechanism.randomness` says where each stage's random numbers come from.
"""
