"""Simulated time: traces that a browser opens."""
