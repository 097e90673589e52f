"""`python -m llorch_operator`."""

from .main import main

main()
