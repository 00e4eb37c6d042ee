"""Policies, one idea a file. A policy is found by import path; there is no registry."""
