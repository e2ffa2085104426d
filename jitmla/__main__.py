"""`python -m jitmla`: the same as the `jitmla` command."""

from .cli import main

if __name__ == "__main__":
    main()
