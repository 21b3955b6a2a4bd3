"""``python -m chanaxes_pl`` is the ``chanaxes`` command."""

from chanaxes_pl.cli import main

main()
