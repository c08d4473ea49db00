"""What every part of the project shares: the command line, errors, files, the CPU and the device, ranks."""
