"""Functions of adapters that run no model: init, stack, merge, combine, and the check that an adapter fits."""
