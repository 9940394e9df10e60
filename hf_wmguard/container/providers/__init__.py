"""Where keys are kept: one module per keeper, each over one client library that is imported when it is used.

A module here imports its own library and nothing else from outside (``tests/test_architecture.py``).
"""

SERVICE_KINDS = ("awskms", "azurekv", "gcpkms", "pkcs11", "vault")
"""Kinds of stanzas that a key service wraps."""
