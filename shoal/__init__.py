"""Large batches of model work on your own hardware. Importing this name alone loads neither torch nor a model."""

__version__ = "0.1.0"
