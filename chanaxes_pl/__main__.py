"""``python -m chanaxes_pl`` is the ``chanaxes`` command."""

from chanaxes_pl.cli.main import main

main()
