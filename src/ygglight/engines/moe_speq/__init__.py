"""Decoding with a mixture of experts whose routed experts do not fit, foreseen by an int4 copy of them."""
