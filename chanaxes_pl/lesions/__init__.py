"""Lesions: a channel removed, set to its mean, or rebuilt from its peers, and the damage that does."""
