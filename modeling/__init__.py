"""The model's backbone, checkpoint folder and weight files, and faster layers for training on a CPU."""
