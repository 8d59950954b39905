"""Everything the serving machine needs."""
