"""`python -m runtime` is `sereno`."""

from runtime.cli import main

if __name__ == "__main__":
    main()
