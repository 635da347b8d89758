"""Wires: topologies as graphs, routes through them, what they cost, and flows that share them. No torch."""
