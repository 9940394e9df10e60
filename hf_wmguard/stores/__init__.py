"""Folders that are kept elsewhere, on the Hub or in S3: which files are there, and any range of their bytes."""
