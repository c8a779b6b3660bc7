"""Methods that add s·B·A: kernels that never make the product, and what leaves of that shape have in common."""
