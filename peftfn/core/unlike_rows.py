"""The error about rows of one batch that cannot be computed in one pass."""


class UnlikeRowsError(ValueError):
    """Rows that cannot be computed in one pass, each with its own adapter.

    `apply` catches it, and runs the model once for each of the adapters (`runtime.routing.rows_apart`); where that
    cannot be done, the message says what the matter is.
    """
