"""The models: load them, decide what is trained, make tiny ones."""
