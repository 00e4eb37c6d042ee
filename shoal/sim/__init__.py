"""Pretend time and pretend models for the engine that serves customers. No torch, no wall clock; files: traces only."""
