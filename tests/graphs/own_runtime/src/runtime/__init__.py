"""The project's own runtime."""
