"""Optimizers, many adapters trained at once, allocation of ranks."""
