"""Optimizers as functions, sweeps (many adapters trained at once), and AdaLoRA's allocation of ranks."""
