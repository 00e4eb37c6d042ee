"""Pretend time and pretend models for the engine that serves customers. No torch, no files, no wall clock."""
