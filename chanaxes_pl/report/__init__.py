"""Report on one run, or several of the same network, as an HTML page."""
