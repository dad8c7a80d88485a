"""`python -m vlkit` is the same program as `vlkit`."""

from vlkit.cli import main

if __name__ == "__main__":
    main()
