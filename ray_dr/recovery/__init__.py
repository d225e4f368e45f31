"""What follows from a failure, and from everything else in a job's life: pure decisions."""
