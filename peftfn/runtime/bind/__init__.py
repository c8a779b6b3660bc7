"""A base bound to adapters: a module that clients take for the model itself."""
