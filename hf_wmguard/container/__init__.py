"""The encrypted container: tensors to protected files and back, and who may open them. Never torch."""
