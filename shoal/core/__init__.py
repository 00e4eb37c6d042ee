"""The words of the engine. Standard library only: no tensors, no clock on the wall, no files."""
