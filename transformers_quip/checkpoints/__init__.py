"""What is on disk: the native format, and (later) the formats of others."""
