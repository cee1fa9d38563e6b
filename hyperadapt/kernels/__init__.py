"""Fused kernels, each with a reference in plain torch that is also its CPU implementation."""
