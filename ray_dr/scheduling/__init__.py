"""Who gets which nodes: pure decisions over `model.scheduling`."""
