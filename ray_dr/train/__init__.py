"""In the training process: the only home of torch."""
