"""Methods that put tokens before the text, or keys and values before those of each layer."""
