"""Use a trained model: index, search, serve, caption."""
