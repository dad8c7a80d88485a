"""Before the first step: rows, complete settings, estimates, feature caches, the open run."""
