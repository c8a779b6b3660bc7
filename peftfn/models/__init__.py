"""A base: its layers, what names them, and the private copy of it that one call runs."""
