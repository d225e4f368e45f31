"""The repository: chunks, part lists and the commit log of every job in a store."""
