"""``python -m normfuse``."""

from normfuse.cli import main

if __name__ == "__main__":
    main()
