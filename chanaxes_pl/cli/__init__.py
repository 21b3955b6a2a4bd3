"""The ``chanaxes`` command."""
