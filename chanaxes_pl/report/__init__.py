"""The page of a report: what one run, or several of the same network, have shown."""
