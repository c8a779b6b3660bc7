"""A base model: its kinds of layers, which of them a config names, and the private copies that a call runs."""
