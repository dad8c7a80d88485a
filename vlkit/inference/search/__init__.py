"""Search an index from the command line."""
