"""Move finished files to where they are kept, and look whether they are safe there. Nothing here can decrypt."""
