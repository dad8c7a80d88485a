"""Put to use: an index, searched from the command line or a page."""
