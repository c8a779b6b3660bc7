"""A base bound to adapters: an `nn.Module` for code that wants one, such as `generate()` and `Trainer`."""
