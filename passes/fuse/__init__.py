"""Fusion rules: each grows a region around an anchor or refuses with a reason."""
