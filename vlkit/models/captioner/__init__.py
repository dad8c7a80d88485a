"""Captioner: a frozen vision encoder, a trained fusion, a frozen language model."""
