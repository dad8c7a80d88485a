"""Build, read and tune a search index."""
