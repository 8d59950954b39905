"""Passes that give every spelling of an operation one name."""
