"""The exporters: one file per target runtime; only this folder imports runtimes, and lazily."""
