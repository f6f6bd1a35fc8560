"""Where images, scenes and questions come from."""
