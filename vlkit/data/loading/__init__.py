"""Batches for both trainers, and the order that they come in."""
