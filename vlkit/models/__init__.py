"""Encoders: load them, run them in stages, tune them, embed images and texts."""
