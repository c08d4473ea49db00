"""Training with in-batch negatives: batches, loss, gradient cache, steps, loop, resume, evaluation."""
