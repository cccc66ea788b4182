"""The cache. Pure: no I/O, nothing here awaits."""
