"""Measure a dual encoder: embeddings, ranks in both directions, metrics, classes, slices and corruptions."""
