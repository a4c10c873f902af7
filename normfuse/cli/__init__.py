"""The command line, a file per command; only this room prints."""

from normfuse.cli.app import main

__all__ = ["main"]
