"""What happened: the journal, and what is told from it."""
