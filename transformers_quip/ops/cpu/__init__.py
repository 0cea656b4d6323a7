"""The ops on the CPU, computed by the compiled library."""
