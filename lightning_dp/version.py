"""The version of lightning_dp, kept in one place."""

__version__ = "0.2.0"
