"""Which channels go together, their removal, and what it saves."""
