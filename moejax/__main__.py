"""`python -m moejax`."""

from moejax.cli.main import main

if __name__ == "__main__":
    main()
