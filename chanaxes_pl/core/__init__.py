"""The mathematics, which can be imported without Lightning."""
