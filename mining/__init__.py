"""What a trained model adds to a training file: hard negatives, and scores for distillation."""
