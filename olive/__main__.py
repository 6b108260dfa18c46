"""`python -m olive` is `olive-quant`."""

from olive.cli import main

main()
