"""Shared by all packages: command line, errors, logs, signals, files, the CPU and the device, Paddle's setup, ranks."""

__version__ = "2.0.0"  # printed by --version, and written into checkpoints and exports
