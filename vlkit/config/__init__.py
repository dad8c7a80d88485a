"""The settings of every command, and how flags, YAML and presets fill them."""
