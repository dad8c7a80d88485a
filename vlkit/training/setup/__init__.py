"""Before the first step: rows, complete settings, estimates, the open run."""
