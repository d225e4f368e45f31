"""The values: frozen dataclasses, standard library only."""
