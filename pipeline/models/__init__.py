"""Models by name, with the parameter names of timm."""
