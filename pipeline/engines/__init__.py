"""Engines own backward, step, clipping, precision and sharding."""
