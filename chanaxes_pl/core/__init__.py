"""The mathematics: importable without Lightning."""
