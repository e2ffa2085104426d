"""Helpers for serving engines. They have no kernels and no policy of their own."""
