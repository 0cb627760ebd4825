"""Layers that take the place of others."""
