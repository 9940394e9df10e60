"""hf-wmguard."""
