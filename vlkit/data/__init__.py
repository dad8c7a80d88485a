"""Read raw data, build the pairs table, and batch it for training."""
