"""A base run with adapters: in one call, or bound to a module."""
