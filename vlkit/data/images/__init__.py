"""Image files: decoding, resizing, and perceptual hashes."""
