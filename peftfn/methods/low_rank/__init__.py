"""Methods that add s·B·A: kernels that never form the product B·A, and functions of leaves that hold A and B."""
