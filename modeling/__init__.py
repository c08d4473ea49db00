"""The model: its backbone, its checkpoint folder, weight files, fast layers for training on a CPU."""
