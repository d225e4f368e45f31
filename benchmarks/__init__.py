"""What ray_dr is measured with. Each module answers one question, stated in its first line; see README.md."""
