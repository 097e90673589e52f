"""`python -m llorch_agent`."""

from .main import main

main()
