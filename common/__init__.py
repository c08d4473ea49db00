"""What every part of the project shares: the command line, errors, files, the CPU and the device, ranks."""

__version__ = "2.0.0"  # --version, checkpoints and exports state it; CHANGELOG.md has the history
