"""What spoils a model or its metrics in the files of a training and its evaluation."""
