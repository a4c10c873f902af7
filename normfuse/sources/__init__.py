"""What people bring: files of models and inputs, read without executing them, and files written whole."""
