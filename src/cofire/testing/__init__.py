"""Public test doubles: hypothesis strategies for specs. Needs the ``dev`` extra."""
