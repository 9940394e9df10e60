"""``python -m tests.hub --folder F``: a Hub in a process of its own."""

from .server import main

main()
