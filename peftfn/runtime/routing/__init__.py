"""A different adapter of a stack for each row of the batch, or each token, in one pass."""
