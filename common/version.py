"""The version of this project, as --version, checkpoints and exports state it; CHANGELOG.md has the history."""

__version__ = "2.0.0"
