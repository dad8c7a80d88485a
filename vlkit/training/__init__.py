"""The one loop, its losses, and the commands that drive it."""
