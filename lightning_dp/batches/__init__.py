"""Whose row is whose in a batch."""
