"""Linears in int8: the schemes, which linears they take, and the scaling that prepares them."""
