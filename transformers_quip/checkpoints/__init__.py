"""Files on disk: the native format, and the formats of other packages, which are re-packed into it."""
