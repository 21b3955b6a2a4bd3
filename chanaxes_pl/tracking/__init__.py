"""The callback, its schedule, its history and what it logs."""
