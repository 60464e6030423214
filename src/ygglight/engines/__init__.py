"""The systems themselves, without Lightning."""
