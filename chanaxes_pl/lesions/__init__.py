"""Lesions: remove a channel, set it to its mean or rebuild it from its peers, and measure the damage."""
