"""More training rows for a prepared folder: changed images and texts, and negatives."""
