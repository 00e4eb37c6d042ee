"""A batch file as a durable job: read, check, plan, feed, journal, write. It must not import torch or know kernels."""
