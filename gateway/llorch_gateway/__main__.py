"""`python -m llorch_gateway`."""

from .main import main

main()
