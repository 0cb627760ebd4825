"""``lightning-dp report``: pictures of finished runs, from what the runs themselves wrote.

runs (metrics.csv, privacy.json) → figures (PNG) → page (one HTML file); facts holds published figures.
"""
